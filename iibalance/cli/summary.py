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

    lines = [f"{'':<{width}}  accuracy    NLL    ECE  alone  weight  Shapley", line("fused", test)]
    for name, own in test["modalities"].items():
        if own is None:
            lines.append(f"{name:<{width}}  missing in every test sample")
            continue
        weight, share = (test["weights"] or {}).get(name), (test["shapley"] or {}).get(name)
        alone = percent(own["alone_accuracy"])
        lines.append(f"{line(name, own)}  {alone}   {percent(weight)}    {percent(share)}")
    return "\n".join(lines)
