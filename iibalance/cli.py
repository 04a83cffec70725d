"""The command line: train, evaluate, predict, budgets, compare.

Every option comes from the dataclasses of :mod:`iibalance.config`. Whatever is wrong with what the
user gave is one line on standard error and exit code 2.

A command imports what it runs when it runs: help and most mistakes are answered without torch.
"""

from __future__ import annotations

import csv
import io
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from iibalance.config import CompareConfig, RunConfig, config_parser, load_config
from iibalance.errors import InputError
from iibalance.files import read_json, write_bytes, write_json

if TYPE_CHECKING:
    from iibalance.nn.model import MultimodalClassifier, Prediction


def run(arguments: Sequence[str], before: Callable[[], None] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 for input that cannot be used.

    ``before`` is called when the arguments have been understood, before the command runs.
    """
    parser = _parser()
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "predict": _predict,
        "budgets": _budgets,
        "compare": _compare,
    }
    try:
        _check_config(arguments)
        options = parser.parse_args(list(arguments))
        if before is not None:
            before()
        commands[options.subcommand](parser, options)
        return 0
    # The last one: a training that diverged.
    except (InputError, ArgumentError, FloatingPointError) as error:
        print(f"iibalance: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "a training run goes on with: iibalance train --resume DIR"
        print(f"iibalance: interrupted; {hint}", file=sys.stderr)
        return 130


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="iibalance",
        description="Budget-aware multimodal training (IIBalance).",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand(
        "train",
        _train_parser(),
        help="train on digits or on your own npz file, and test once at the end",
    )
    commands.add_subcommand(
        "evaluate",
        _evaluate_parser(),
        help="metrics of a trained run on the test split, clean or degraded",
    )
    commands.add_subcommand(
        "predict",
        _predict_parser(),
        help="probabilities, fusion weights and uncertainty for new samples",
    )
    commands.add_subcommand(
        "budgets",
        _budgets_parser(),
        help="estimate the Intrinsic Information Budgets alone: those that train estimates",
    )
    commands.add_subcommand(
        "compare",
        _compare_parser(),
        help="every method under one protocol: tuned alike, several seeds, degraded input too",
    )
    return parser


def _train_parser() -> ArgumentParser:
    parser = config_parser()
    _add_config(parser)
    parser.add_argument(
        "--resume",
        type=str,
        default=None,
        metavar="DIR",
        help="Go on with the interrupted run in DIR, with its own options.",
    )
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_argument
    add("run", type=str, help="the run's folder")
    add(
        "--degrade",
        nargs="+",
        default=[],
        metavar="MODALITY=KIND",
        help="degrade a modality: noise, missing or shuffled",
    )
    add("--fraction", type=float, default=0.5, help="share of the samples that are degraded")
    add(
        "--strength",
        type=float,
        default=3.0,
        help="of the noise, in standard deviations of the training inputs",
    )
    add("--seed", type=int, default=0, help="chooses the degraded samples and the noise")
    add(
        "--data.path",
        type=str,
        default=None,
        help="another npz file than the one the run was trained on",
    )
    add(
        "--output",
        type=str,
        default=None,
        help="JSON file; evaluation-<conditions>.json in the run's folder by default",
    )
    return parser


def _predict_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("run", type=str, help="the run's folder")
    parser.add_argument(
        "--data.path",
        type=str,
        required=True,
        help="npz file with x_<modality> (and mask_<modality>); y is not needed",
    )
    parser.add_argument(
        "--output", type=str, default="predictions.csv", help="file to write: .csv or .npz"
    )
    return parser


def _budgets_parser() -> ArgumentParser:
    parser = config_parser(skip={"output"})
    _add_config(parser)
    parser.add_argument(
        "--output", type=str, default=None, help="JSON file for --budgets.path of train"
    )
    return parser


def _compare_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CompareConfig)
    _add_config(parser)
    return parser


def _add_config(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", action="config", help="YAML file with some or all of these options"
    )


def _check_config(arguments: Sequence[str]) -> None:
    """jsonargparse does not say which file it could not parse."""
    following = [*arguments[1:], ""]
    for argument, value in zip(arguments, following):
        name, equals, text = argument.partition("=")
        path = Path(text if equals else value).expanduser()
        if name != "--config" or not path.is_file():
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path}: is not a readable YAML file ({error})") from None
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected options by name")


def _configuration(kind: type, values):
    """The options of ``kind`` among the parsed values."""
    return kind(
        **{field.name: values[field.name] for field in fields(kind) if field.name in values}
    )


def _train(parser: ArgumentParser, options) -> None:
    from iibalance.training.run import default_output, train

    values = parser.instantiate(options).train
    config, resume = _configuration(RunConfig, values), values["resume"]
    if resume is not None:
        config = _saved_options(config, resume)
    config = replace(config, output=config.output or default_output(config))
    metrics = train(config, resume=resume is not None)
    if metrics:
        print(_summary(metrics))
        print(f"run folder: {config.output}")


def _saved_options(config: RunConfig, resume: str) -> RunConfig:
    """The options of the run that is gone on with; InputError where others were given."""
    from iibalance.methods.registry import absolute

    path = Path(resume).expanduser() / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"resume: {resume} holds no run (no config.yaml); give the folder of an interrupted run"
        )
    saved = replace(load_config(path), output=resume)
    given = replace(config, method=absolute(config.method))
    for name, value, default, first in _leaves(asdict(given), asdict(RunConfig()), asdict(saved)):
        if value not in (default, first):
            raise InputError(
                f"{name}: {value!r} differs from {first!r} of the run in {resume}; "
                "leave it out, or start a new run"
            )
    return saved


def _leaves(*trees: dict, prefix: str = "") -> Iterator[tuple]:
    """Dotted names with the values that several nested dicts hold there."""
    for key in trees[0]:
        values = [tree[key] for tree in trees]
        if key != "layouts" and all(isinstance(value, dict) for value in values):
            yield from _leaves(*values, prefix=f"{prefix}{key}.")
        else:
            yield (prefix + key, *values)


def _evaluate(parser: ArgumentParser, options) -> None:
    from iibalance.data import load_data
    from iibalance.data.corruption import parse_degrade
    from iibalance.training.evaluation import degrade, evaluate
    from iibalance.training.saving import load

    options = options.evaluate
    _check_output(options.output)
    model = load(options.run)
    folder = Path(options.run).expanduser()
    config, path = load_config(folder / "config.yaml").data, options["data"]["path"]
    if path is not None:
        config = replace(config, path=path)
    # Standardised as the model was trained, not by another file's own training split.
    data = load_data(config, standardizer=model.standardizer)
    if data.num_classes != model.num_classes:
        raise InputError(
            f"data.path: {path} has {data.num_classes} classes, the run {model.num_classes}"
        )
    split, first = data.test, read_json(folder / "metrics.json")
    conditions = [parse_degrade(text, model.modalities) for text in options.degrade]
    how = {name: options[name] for name in ("fraction", "strength", "seed")}
    for modality, kind in conditions:
        split = degrade(split, modality, kind, **how)
    modalities = first["test"]["modalities"]
    alone = {name: (value or {}).get("alone_accuracy") for name, value in modalities.items()}
    majority = int(data.train.targets.bincount().argmax())
    metrics = evaluate(model, split, alone=alone, majority=majority).metrics
    result = {"method": first["method"], "conditions": options.degrade, **how, "test": metrics}
    name = "-".join(f"{modality}-{kind}" for modality, kind in conditions) or "clean"
    output = folder / f"evaluation-{name}.json"
    if options.output:
        output = Path(options.output).expanduser()
    write_json(output, result)
    print(_summary(result))
    print(f"written to {output}")


def _predict(parser: ArgumentParser, options) -> None:
    from iibalance.data.npz import read_inputs
    from iibalance.training.saving import load

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
    as_bytes = _as_npz if output.suffix == ".npz" else _as_csv
    write_bytes(output, as_bytes(model, found, ids))
    print(f"{len(ids)} predictions written to {output}")
    if targets is not None and len(targets) and int(targets.max()) < model.num_classes:
        right = (found.probabilities.argmax(1) == targets).float().mean()
        print(f"accuracy on the labels in the file: {float(right):.4f}")


def _as_npz(model: MultimodalClassifier, found: Prediction, ids: Sequence[str]) -> bytes:
    import numpy as np

    arrays = {
        "id": np.array(ids),
        "probabilities": found.probabilities.numpy(),
        "classes": np.array(model.class_names),
    }
    for name in ("weights", "uncertainty"):
        values = getattr(found, name)
        if values is not None:
            arrays[name] = values.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _as_csv(model: MultimodalClassifier, found: Prediction, ids: Sequence[str]) -> bytes:
    columns = {"weight": found.weights, "uncertainty": found.uncertainty}
    columns = {name: values for name, values in columns.items() if values is not None}
    header = ["id", "prediction", *(f"p.{name}" for name in model.class_names)]
    header += [f"{kind}.{name}" for kind in columns for name in model.modalities]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row, identifier in enumerate(ids):
        p = found.probabilities[row]
        numbers = [*p.tolist(), *(x for values in columns.values() for x in values[row].tolist())]
        label = model.class_names[int(p.argmax())]
        writer.writerow([identifier, label, *(f"{number:.6g}" for number in numbers)])
    return text.getvalue().encode()


def _budgets(parser: ArgumentParser, options) -> None:
    from iibalance.training.run import estimate_run_budgets

    values = parser.instantiate(options).budgets
    output = values.pop("output")
    config = _configuration(RunConfig, values)
    if config.budgets.path is not None:
        raise InputError(
            f"budgets.path: {config.budgets.path} holds budgets already; "
            "leave it out to estimate them"
        )
    _check_output(output)
    found = estimate_run_budgets(config)
    print(found.table())
    if output:
        found.save(output)
        print(f"written to {output}")


def _compare(parser: ArgumentParser, options) -> None:
    from iibalance.comparison.protocol import compare

    config = _configuration(CompareConfig, parser.instantiate(options).compare)
    result = compare(config)
    ranks = result["ranks"].get("clean", {"accuracy": {}, "nll": {}})
    print(f"{'':<24}average rank, clean: accuracy    NLL")
    for method, row in ranks["accuracy"].items():
        print(f"{method:<24}{row['rank']:>29.2f} {ranks['nll'][method]['rank']:>6.2f}")
    for key, text in result["failures"].items():
        print(f"failed: {key}: {text}", file=sys.stderr)
    print(f"comparison: {config.output} (comparison.md, comparison.csv, comparison.png)")


def _check_output(path: str | Path | None) -> None:
    """Before the work: a result without a place to go is work lost."""
    if path is None:
        return
    place = Path(path).expanduser()
    if not place.parent.is_dir():
        raise InputError(f"output: {path} cannot be written: there is no folder {place.parent}")
    if place.is_dir():
        raise InputError(f"output: {path} is a folder; give a file's name")


def _summary(result: dict) -> str:
    """The table that train and evaluate print."""
    test = result["test"]
    width = max(len(name) for name in ("fused", *test["modalities"]))

    def percent(value: float | None) -> str:
        return "    -" if value is None else f"{100 * value:5.1f}"

    def line(name: str, row: dict) -> str:
        numbers = f"{percent(row['accuracy'])}  {row['nll']:.3f}  {row['ece']:.3f}"
        return f"{name:<{width}}     {numbers}"

    lines = [f"{'':<{width}}  accuracy    NLL    ECE  alone  weight  Shapley", line("fused", test)]
    for name, own in test["modalities"].items():
        if own is None:
            lines.append(f"{name:<{width}}  missing in every test sample")
            continue
        weight, share = (test["weights"] or {}).get(name), (test["shapley"] or {}).get(name)
        alone = percent(own["alone_accuracy"])
        lines.append(f"{line(name, own)}  {alone}   {percent(weight)}    {percent(share)}")
    return "\n".join(lines)
