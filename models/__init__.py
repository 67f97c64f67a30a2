"""Networks: no loss, no noise, nothing that knows how they are trained.

autoencoders/     what VAEs are called, made of, and stored as
backbones/        what vision encoders are called, made of, and stored as
checks/           UserError: a mistake that the user can mend; kinds of files, values
discriminator.py  PatchGAN, the discriminator of the VAE's reconstructions
encoders.py       frozen vision encoders: how one is loaded and what it gives
layers/           norms and convolutions in the right number format under autocast
latent_norm.py    the batch norm of latents, and batch norm over all ranks
lpips.py          perceptual distances: LPIPS with VGG-16, the same with another network
projector.py      from SiT tokens to encoder features: MLP (REPA) or convolution (iREPA)
sit.py            SiT, the velocity network; load_sit
sizes.py          SIZES, the published sizes of SiT (imports nothing)
vae.py            VAE, one class for all autoencoders; load_vae, build_vae
weights/          weight files: find, download, hash, read, load strictly
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  the lowest floor is imported first
    here = "{} is Python {}.{}".format(sys.executable, *sys.version_info)
    print(f"error: Python 3.11 or newer is needed, and {here}", file=sys.stderr)
    sys.exit(2)
