"""One run, from data to report: ``train(RunConfig(...))`` in run.py is the way in.

    run           options and data checked, a folder made or gone on with
    run_checks    what a run is refused for beside its data
    stages        the stages of a run in order: budgets, training, calibration, report
    budget_stage  stage 1, and ``estimate_budgets`` for arrays
    trainer       trainings one after another, each kept once it is done
    loop          the training loop
    checkpoint    how far a training is, and what a stopped one goes on from
    surroundings  threads and garbage collection while a run lasts
    sampling      seeds, and the order of samples
    evaluation    what is reported of a model
    saving        a run's folder back to a model
    header        what a saved model says of itself, without torch
    folder        a run's folder: whole files, a lock, checkpoints
    report        one run on one page
    report_panels the four panels of that page

What may come in: everything but comparison and the command line.
"""
