"""Every method under one protocol: ``compare(CompareConfig(...))`` in protocol.py is the way in.

    protocol     options checked, settings tried, the chosen ones tested, everything written
    cells        one training and what is measured of it, in files of its own
    resampling   the samples of a data set split anew
    tuning       the settings that every method tries, and what validation chooses
    workers      cells in as many processes as there are cores
    timing       seconds of a training step, method beside method
    results      what was measured, as a tidy table (comparison.csv) and grouped
    statistics   means, ranks, ablations, heads, the paired bootstrap
    blocks       the same over data sets and splits: tests of ranks, estimated differences
    joining      one page over the tables of several comparisons
    tables       the page (comparison.md); split_tables: what it says of splits; table_text: pieces
    picture      critical-difference diagrams (comparison.png)

What may come in: everything but the command line. Only the command line and benchmarks import it.
"""
