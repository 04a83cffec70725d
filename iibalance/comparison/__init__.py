"""Every method under one protocol: ``compare(CompareConfig(...))`` in protocol.py is the way in.

    protocol     options checked, settings tried, the chosen ones tested, everything written
    cells        one training and what is measured of it, in files of its own
    workers      cells in as many processes as there are cores
    timing       seconds of a training step, method beside method
    results      what was measured, as a tidy table (comparison.csv) and grouped
    statistics   means, ranks, ablations, heads, the paired bootstrap
    tables       the page (comparison.md) and the tables of benchmarks/README.md
    picture      critical-difference diagrams (comparison.png)

What may come in: everything but the command line. Only the command line and benchmarks import it.
"""
