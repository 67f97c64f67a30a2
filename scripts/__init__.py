"""Programs around train_repae.py, sample_ddp.py and evaluate_fid.py: arguments and calls.

quickstart.sh         trains, samples and evaluates on digits: the whole method on 2 CPU cores
test.sh               lint and all tests
environment.sh        the Python environment of both: made on first use, or the user's own
test_minimum.sh       the fast tests with the oldest versions of the packages
doctor.py             checks a run before it starts
settings_that_fit.py  memory and speed of a config on GPUs, with the cheapest settings that fit
benchmark.py          measures training, sampling or loading here, or predicts them
gpu_report.sh         all that can be measured on one GPU, and the gpu tests
prepare_data.py       packs images as raw pixels
cache_latents.py      encodes images once, for a frozen VAE
vae_stats.py          mean and std of a VAE's latents
import_official.py    published weights as a checkpoint of this repository
export_vae.py         the VAE of a checkpoint as a diffusers folder
export_pipeline.py    a checkpoint as a diffusers pipeline that needs nothing of this repository
visualize_latents.py  latents as colours; samples in the course of training
plot_solvers.py       error of each ODE solver against its number of network calls
report.py             one page about one or several runs: pictures, curves, settings
reproduce_tables.py   the paper's tables: commands, published and measured numbers; the digits study
train_classifier.py   a small classifier of any images: an encoder to align with, or a judge
nearest_images.py     samples beside the training images that are most like them
quickstart_report.py  accuracy, pictures and summary at the end of the quickstart
"""
