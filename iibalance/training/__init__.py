"""One run, from data to report: ``train(RunConfig(...))`` in run.py is the way in.

    run           options and data checked, a folder made or gone on with
    stages        the stages of a run in order: budgets, training, calibration, report
    budget_stage  stage 1, and ``estimate_budgets`` for arrays
    trainer       trainings one after another, each kept once it is done
    loop          the training loop
    checkpoint    how far a training is, and what a stopped one goes on from
    sampling      seeds, and the order of samples
    evaluation    what is reported of a model
    saving        a run's folder back to a model
    folder        a run's folder: whole files, a lock, checkpoints
    report        one run on one page
    report_panels the four panels of that page

What may come in: everything but comparison and the command line.
"""
