"""The table that train and evaluate print."""

from __future__ import annotations


def summary(result: dict) -> str:
    """A line for the fused prediction and one a modality, in percent and nats.

    ``result``: what ``metrics.json`` or an evaluation holds.
    """
    test = result["test"]
    width = max(len(name) for name in ("fused", *test["modalities"]))

    def percent(value: float | None) -> str:
        return "    -" if value is None else f"{100 * value:5.1f}"

    def line(name: str, row: dict) -> str:
        numbers = f"{percent(row['accuracy'])}  {row['nll']:.3f}  {row['ece']:.3f}"
        return f"{name:<{width}}     {numbers}"

    header = f"{'':<{width}}  accuracy    NLL    ECE  alone  trust  contribution"
    lines = [header, line("fused", test)]
    for name, own in test["modalities"].items():
        if own is None:
            lines.append(f"{name:<{width}}  missing in every test sample")
            continue
        trust, added = ((test[key] or {}).get(name) for key in ("trust", "contributions"))
        alone = percent(own["alone_accuracy"])
        trusted = "    -" if trust is None else f"{trust:5.2f}"
        nats = "-" if added is None else f"{added:+.2f} nats"
        lines.append(f"{line(name, own)}  {alone}  {trusted}  {nats:>12}")
    return "\n".join(lines)


def fusion_note(metrics: dict) -> str | None:
    """What to know where the fused prediction is no better than one modality's on validation.

    ``metrics``: of a run. Lower NLL is better. None where the fusion is, and where nothing is
    fused; modalities that some validation sample lacks have figures of other samples.

    >>> own = {name: {"nll": nll, "accuracy": right, "samples": 50}
    ...        for name, nll, right in (("audio", 0.2, 0.93), ("image", 1.1, 0.61))}
    >>> validation = {"nll": 0.25, "accuracy": 0.92, "modalities": own}
    >>> note = fusion_note({"samples": {"validation": 50}, "validation": validation})
    >>> print(note.replace(" (", "\\n("))
    note: on validation the fused prediction is no better than audio alone
    (NLL 0.250 against 0.200, accuracy 92.0 % against 93.0 %)
    """
    fused = metrics["validation"]
    count = metrics["samples"]["validation"]
    own = {
        name: row
        for name, row in fused["modalities"].items()
        if row is not None and row["samples"] == count
    }
    if not own or len(fused["modalities"]) < 2 or metrics.get("method") == "unimodal":
        return None
    name = min(own, key=lambda name: own[name]["nll"])
    if fused["nll"] < own[name]["nll"]:
        return None
    return (
        f"note: on validation the fused prediction is no better than {name} alone "
        f"(NLL {fused['nll']:.3f} against {own[name]['nll']:.3f}, "
        f"accuracy {100 * fused['accuracy']:.1f} % against {100 * own[name]['accuracy']:.1f} %)"
    )
