"""The paper's tables beside our own measurements, and its phenomenon on a CPU.

published.yaml         every published number, with the config and the step that make its row
tables.py              the tables of published.yaml: rows, the published protocol, the commands
measured.py            records of evaluate_fid.py: their row, whether they may stand beside it
showing.py             tables as text and as Markdown, published numbers beside measured ones
digits_study.py        the study on digits: its arms, training them, measuring every checkpoint
digits_results.py      its measurements as Markdown and as a plot
classifier.py          a small classifier: the encoder and the judge of the digits
quickstart_report.py   the end of the quickstart: accuracy, grid, curves, summary
"""
