"""The command line: train, evaluate, predict, budgets, compare. Every option comes from the dataclasses of :mod:`iibalance.config`.

Whatever is wrong with what the user gave is one line on standard error and exit code 2.
"""

from __future__ import annotations

import csv
import io
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from iibalance.comparison.protocol import CompareConfig, compare
from iibalance.config import (
    BudgetConfig,
    DataConfig,
    RunConfig,
    TrainingConfig,
    config_parser,
    load_config,
)
from iibalance.data import load_data, parse_degrade, read_inputs
from iibalance.errors import InputError
from iibalance.files import read_json, write_bytes, write_json
from iibalance.training.budget_stage import estimate_budgets
from iibalance.training.evaluation import degrade, evaluate
from iibalance.training.run import default_output, train
from iibalance.training.saving import load


def run(arguments: Sequence[str]) -> int:
    """Run one command; the exit code is 0, or 2 for input that cannot be used."""
    parser = _parser()
    try:
        _check_config(arguments)
        options = parser.parse_args(list(arguments))
        command = {
            "train": _train,
            "evaluate": _evaluate,
            "predict": _predict,
            "budgets": _budgets,
            "compare": _compare,
        }[options.subcommand]
        return command(parser, options) or 0
    except (
        InputError,
        ArgumentError,
        FloatingPointError,
    ) as error:  # the last one: a training that diverged
        print(f"iibalance: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "iibalance: interrupted; a training run goes on with: iibalance train --resume DIR",
            file=sys.stderr,
        )
        return 130


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="iibalance",
        description="Budget-aware multimodal training (IIBalance).",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True)

    one = config_parser()
    one.add_argument(
        "--config", action="config", help="YAML file with some or all of these options"
    )
    one.add_argument(
        "--resume",
        type=str,
        default=None,
        metavar="DIR",
        help="Go on with the interrupted run in DIR, with its own options.",
    )
    commands.add_subcommand(
        "train", one, help="train on digits or on your own npz file, and test once at the end"
    )

    one = ArgumentParser(exit_on_error=False)
    one.add_argument("run", type=str, help="the run's folder")
    one.add_argument(
        "--degrade",
        nargs="+",
        default=[],
        metavar="MODALITY=KIND",
        help="degrade a modality: noise, missing or shuffled",
    )
    one.add_argument(
        "--fraction", type=float, default=0.5, help="share of the samples that are degraded"
    )
    one.add_argument(
        "--strength",
        type=float,
        default=3.0,
        help="of the noise, in standard deviations of the training inputs",
    )
    one.add_argument(
        "--seed", type=int, default=0, help="chooses the degraded samples and the noise"
    )
    one.add_argument(
        "--data.path",
        type=str,
        default=None,
        help="another npz file than the one the run was trained on",
    )
    one.add_argument(
        "--output",
        type=str,
        default=None,
        help="JSON file; evaluation-<conditions>.json in the run's folder by default",
    )
    commands.add_subcommand(
        "evaluate", one, help="metrics of a trained run on the test split, clean or degraded"
    )

    one = ArgumentParser(exit_on_error=False)
    one.add_argument("run", type=str, help="the run's folder")
    one.add_argument(
        "--data.path",
        type=str,
        required=True,
        help="npz file with x_<modality> (and mask_<modality>); y is not needed",
    )
    one.add_argument(
        "--output", type=str, default="predictions.csv", help="file to write: .csv or .npz"
    )
    commands.add_subcommand(
        "predict", one, help="probabilities, fusion weights and uncertainty for new samples"
    )

    one = ArgumentParser(exit_on_error=False)
    one.add_class_arguments(DataConfig, "data")
    one.add_class_arguments(BudgetConfig, "budgets", skip={"path"})
    one.add_class_arguments(TrainingConfig, "training")
    one.add_argument("--seed", type=int, default=0, help="of the folds and trainings")
    one.add_argument(
        "--epochs",
        type=int,
        default=30,
        help="as in train: the unimodal trainings take half of it, unless budgets.epochs says otherwise",
    )
    one.add_argument(
        "--output", type=str, default=None, help="JSON file for --budgets.path of train"
    )
    commands.add_subcommand("budgets", one, help="estimate the Intrinsic Information Budgets alone")

    one = ArgumentParser(exit_on_error=False)
    one.add_class_arguments(CompareConfig)
    one.add_argument(
        "--config", action="config", help="YAML file with some or all of these options"
    )
    commands.add_subcommand(
        "compare",
        one,
        help="every method under one protocol: tuned alike, several seeds, clean and degraded input",
    )
    return parser


def _check_config(arguments: Sequence[str]) -> None:
    """jsonargparse does not say which file it could not parse."""
    for index, argument in enumerate(arguments):
        path = Path(
            argument[9:]
            if argument.startswith("--config=")
            else (*arguments, "")[index + 1]
            if argument == "--config"
            else ""
        ).expanduser()
        if path.is_file():
            try:
                if not isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict):
                    raise InputError(f"{path}: expected options by name")
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise InputError(f"{path}: is not a readable YAML file ({error})") from None


def _train(parser: ArgumentParser, options) -> None:
    values = parser.instantiate(options).train
    resume = values.pop("resume")
    values.pop("config", None)
    config = RunConfig(**{field.name: values[field.name] for field in fields(RunConfig)})
    if resume is not None:
        if not (Path(resume).expanduser() / "config.yaml").is_file():
            raise InputError(
                f"resume: {resume} holds no run (no config.yaml); give the folder of an interrupted run"
            )
        saved = replace(load_config(Path(resume).expanduser() / "config.yaml"), output=resume)
        for name, value, default, first in _leaves(
            asdict(config), asdict(RunConfig()), asdict(saved)
        ):
            if value not in (default, first):
                raise InputError(
                    f"{name}: {value!r} differs from {first!r} of the run in {resume}; leave it out, or start a new run"
                )
        config = saved
    config = replace(config, output=config.output or default_output(config))
    metrics = train(config, resume=resume is not None)
    if metrics:
        print(_summary(metrics))
        print(f"run folder: {config.output}")


def _evaluate(parser: ArgumentParser, options) -> None:
    options = options.evaluate
    _check_output(options.output)
    model = load(options.run)
    folder = Path(options.run).expanduser()
    config = load_config(folder / "config.yaml").data
    path = options["data"]["path"]
    if path is not None:
        config = replace(config, path=path)
    data = load_data(config)
    if data.modalities != model.modalities or data.num_classes != model.num_classes:
        raise InputError(
            f"data.path: {path} has the modalities {', '.join(data.modalities)} and {data.num_classes} classes, the run "
            f"{', '.join(model.modalities)} and {model.num_classes}"
        )
    for name, shape in data.shapes.items():
        if tuple(shape) != tuple(model.standardizer.shapes[name]):
            raise InputError(
                f"data.path: {path}: x_{name}: samples have shape {tuple(shape)}, but the model was trained on {model.standardizer.shapes[name]}"
            )
    split = data.test
    if (
        path is not None
    ):  # standardised as the model was trained, not by this file's own training split
        split = replace(split, inputs=model.standardizer.transform(_raw(data, split), split.mask))
    conditions = [parse_degrade(text, model.modalities) for text in options.degrade]
    for modality, kind in conditions:
        split = degrade(
            split,
            modality,
            kind,
            fraction=options.fraction,
            strength=options.strength,
            seed=options.seed,
        )
    first = read_json(folder / "metrics.json")
    alone = {
        name: (value or {}).get("alone_accuracy")
        for name, value in first["test"]["modalities"].items()
    }
    metrics, _ = evaluate(
        model, split, alone=alone, majority=int(torch.bincount(data.train.targets).argmax())
    )
    name = "-".join(f"{modality}-{kind}" for modality, kind in conditions) or "clean"
    result = {
        "method": first["method"],
        "conditions": options.degrade,
        "fraction": options.fraction,
        "strength": options.strength,
        "seed": options.seed,
        "test": metrics,
    }
    output = (
        Path(options.output).expanduser() if options.output else folder / f"evaluation-{name}.json"
    )
    write_json(output, result)
    print(_summary({"method": first["method"], "test": metrics}))
    print(f"written to {output}")


def _predict(parser: ArgumentParser, options) -> None:
    options = options.predict
    output = Path(options.output).expanduser()
    if output.suffix not in (".csv", ".npz"):
        raise InputError(f"output: {output} must end in .csv or .npz")
    _check_output(output)
    model = load(options.run)
    inputs, mask, targets, ids = read_inputs(
        options["data"]["path"], model.modalities, model.standardizer.shapes
    )
    found = model.predict(inputs, mask)
    if output.suffix == ".npz":
        arrays = {
            "id": np.array(ids),
            "probabilities": found.probabilities.numpy(),
            "classes": np.array(model.class_names),
        }
        arrays |= {
            key: value.numpy()
            for key, value in (("weights", found.weights), ("uncertainty", found.uncertainty))
            if value is not None
        }
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_bytes(output, buffer.getvalue())
    else:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        extra = [
            (name, value)
            for name, value in (("weight", found.weights), ("uncertainty", found.uncertainty))
            if value is not None
        ]
        writer.writerow(
            [
                "id",
                "prediction",
                *(f"p.{name}" for name in model.class_names),
                *(f"{kind}.{name}" for kind, _ in extra for name in model.modalities),
            ]
        )
        for row, identifier in enumerate(ids):
            p = found.probabilities[row]
            writer.writerow(
                [
                    identifier,
                    model.class_names[int(p.argmax())],
                    *(f"{value:.6g}" for value in p.tolist()),
                    *(f"{value:.6g}" for _, values in extra for value in values[row].tolist()),
                ]
            )
        write_bytes(output, text.getvalue().encode())
    print(f"{len(ids)} predictions written to {output}")
    if targets is not None and len(targets) and int(targets.max()) < model.num_classes:
        print(
            f"accuracy on the labels in the file: {float((found.probabilities.argmax(1) == targets).float().mean()):.4f}"
        )


def _budgets(parser: ArgumentParser, options) -> None:
    values = parser.instantiate(options).budgets
    if values.budgets.source == "online":
        raise InputError(
            "budgets.source: online budgets are estimated while training; use train --budgets.source online"
        )
    _check_output(values.output)
    data, budgets = load_data(values.data), values.budgets
    from iibalance.nn.encoders import build_encoder

    encoders = {
        name: (lambda name=name: build_encoder(data.shapes[name], layout=data.layouts[name]))
        for name in data.modalities
    }
    found = estimate_budgets(
        data.train.inputs,
        data.train.targets,
        source=budgets.source,
        mask=data.train.mask,
        groups=data.train.groups,
        folds=budgets.folds,
        encoders=encoders,
        epochs=budgets.epochs or max(1, values.epochs // 2),
        training=values.training,
        seed=values.seed,
    )
    print(found.table())
    if values.output:
        found.save(values.output)
        print(f"written to {values.output}")


def _compare(parser: ArgumentParser, options) -> None:
    values = parser.instantiate(options).compare
    values.pop("config", None)
    config = CompareConfig(**{field.name: values[field.name] for field in fields(CompareConfig)})
    result = compare(config)
    ranks = result["ranks"].get("clean", {"accuracy": {}, "nll": {}})
    print(f"{'':<24}average rank, clean: accuracy    NLL")
    for method, row in ranks["accuracy"].items():
        print(f"{method:<24}{row['rank']:>29.2f} {ranks['nll'][method]['rank']:>6.2f}")
    for key, text in result["failures"].items():
        print(f"failed: {key}: {text}", file=sys.stderr)
    print(f"comparison: {config.output} (comparison.md, comparison.json, comparison.png)")


def _check_output(path: str | Path | None) -> None:
    """Before the work: a result without a place to go is work lost."""
    if path is not None and not Path(path).expanduser().parent.is_dir():
        raise InputError(
            f"output: {path} cannot be written: there is no folder {Path(path).expanduser().parent}"
        )
    if path is not None and Path(path).expanduser().is_dir():
        raise InputError(f"output: {path} is a folder; give a file's name")


def _raw(data, split) -> dict[str, torch.Tensor]:
    """A split's inputs with this data's own standardisation undone."""
    return {
        name: values * getattr(data.standardizer, f"std_{name}")
        + getattr(data.standardizer, f"mean_{name}")
        for name, values in split.inputs.items()
    }


def _leaves(*trees: dict, prefix: str = ""):
    """Dotted names with the values that several nested dicts hold there."""
    for key in trees[0]:
        values = [tree[key] for tree in trees]
        if (
            isinstance(values[0], dict)
            and all(isinstance(value, dict) for value in values)
            and key != "layouts"
        ):
            yield from _leaves(*values, prefix=f"{prefix}{key}.")
        else:
            yield (prefix + key, *values)


def _summary(metrics: dict) -> str:
    test = metrics["test"]
    width = max(len(name) for name in ("fused", *test["modalities"]))
    percent = lambda value: "    -" if value is None else f"{100 * value:5.1f}"
    lines = [f"{'':<{width}}  accuracy    NLL    ECE  alone  weight  Shapley"]
    lines.append(
        f"{'fused':<{width}}     {percent(test['accuracy'])}  {test['nll']:.3f}  {test['ece']:.3f}"
    )
    for name, own in test["modalities"].items():
        if own is None:
            lines.append(f"{name:<{width}}  missing in every test sample")
            continue
        weight, share = (test["weights"] or {}).get(name), (test["shapley"] or {}).get(name)
        lines.append(
            f"{name:<{width}}     {percent(own['accuracy'])}  {own['nll']:.3f}  {own['ece']:.3f}  {percent(own['alone_accuracy'])}   {percent(weight)}"
            f"    {percent(share)}"
        )
    return "\n".join(lines)
