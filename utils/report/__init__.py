"""report.html: the story of one or several runs in one file that fetches nothing.

From a run's folder to a page, in the order in which they call each other:

    page.py       the page: its parts in their order, and the file
    sections.py   summary, settings, versions and sessions, as tables
    results.py    evaluations in training, and records of evaluate_fid.py beside published numbers
    gallery.py    pictures over time, recompressed, under one slider
    charts.py     one chart of one metric as SVG
    scales.py     axes: robust ranges, ticks, thinning that keeps extremes, smoothing
    catalog.py    what each metric is: group, title, unit, a sentence
    events.py     what happened at which step
    collect.py    what a run's folder holds
    markup.py     HTML from Python, with everything escaped
    report.css    how it looks: narrow, dark, printed
    report.js     the slider, and values under the pointer
"""
