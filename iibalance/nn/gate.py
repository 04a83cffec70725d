"""The gate (method page, section 4) and its calibration by MAP (section 5, stage 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import iib_kernels
from iibalance.errors import InputError, as_sequence, check_names
from iibalance.metrics import fit_temperature, own_temperatures

# Of a gate that has not been fitted: sigmoid(WHOLE) is 1, and what is left to doubt is exp(-10000).
WHOLE = 1e4
# The MAP prior of what is fitted: its mean, and standard deviations around it. A trust of 0.98
# where nothing is unusual.
OFFSET = 4.0
WIDTHS = {"trust_offset": 1.5, "surprise_weight": 1.0, "log_scale": 0.3}
# Shares of the corrupted copies' weight that a fit may choose from, the largest first.
HEDGES = (1.0, 0.3, 0.1, 0.0)


class Gate(nn.Module):
    """Product of the modalities' predictions, each as far as it can be trusted on this sample.

    With p_m = softmax(l_m / T_m), T_m the temperature that calibrates modality m's own prediction,
    and the trust r_m = sigmoid(a_m - xi_m d_m), which falls with the surprise d_m, the fused logits
    are f = scale * sum_m log(r_m p_m + (1 - r_m) / K) over the modalities present.

    So a modality tells of the sample with probability r_m and of nothing otherwise. One that is
    sure and wrong can be outvoted, and one that knows nothing adds nothing, whatever its trust.

    Every piece starts neutral (T = 1, r = 1, scale = 1), where f is the sum of log p_m, and stays
    so until :meth:`fit`.

    Args:
        modalities: their names, in the order of the logits.
        impl: ``iib_kernels`` implementation, ``"auto"``, ``"triton"`` or ``"reference"``.

    Source: arXiv 2603.17347 (uncertainty-gated Bayesian fusion); the equations are this project's
    own formulation.

    >>> gate = Gate(["audio", "visual"])
    >>> audio, visual = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> gate([audio, visual]).logits.softmax(1)  # neutral: that of the sum, [2, 1]
    tensor([[0.7311, 0.2689]])
    >>> gate([audio, visual], mask=torch.tensor([[True, False]])).trust.round(decimals=4)
    tensor([[1., 0.]])
    """

    def __init__(self, modalities: Sequence[str], *, impl: str = "auto"):
        super().__init__()
        self.modalities, self.impl = check_names(modalities), impl
        count = len(self.modalities)
        self.log_temperature = _frozen(torch.zeros(count))
        self.trust_offset = _frozen(torch.full((count,), WHOLE))  # a
        self.surprise_weight = _frozen(torch.zeros(count))  # xi
        self.log_scale = _frozen(torch.zeros(()))
        self.register_buffer("own_temperature", torch.ones(count))

    @property
    def temperature(self) -> Tensor:
        """T_m, [M]."""
        return self.log_temperature.exp()

    def forward(
        self,
        logits: Mapping[str, Tensor] | Sequence[Tensor],
        surprise: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> iib_kernels.TrustOutput:
        """Fuse the modalities' logits.

        Args:
            logits: M of [B, K].
            surprise: [B, M] >= 0, of :meth:`~iibalance.nn.prototypes.PrototypeBank.surprise`.
            mask: [B, M] bool, True = present.

        Returns ``TrustOutput(logits [B, K], trust [B, M])``. The trust is that after all
        predictions are known (:func:`iib_kernels.trusted_fusion`): it falls with the surprise, and
        where a modality contradicts the others. Raises ValueError for a row with no modality
        present.
        """
        logits = as_sequence(logits, self.modalities, "logits")
        return iib_kernels.trusted_fusion(
            logits,
            self._trust_logits(surprise, mask),
            temperature=self.temperature,
            scale=self.log_scale.exp(),
            mask=mask,
            impl=self.impl,
        )

    def own(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each modality's logits (M of [B, K]) calibrated as its own prediction."""
        return tuple(values / its for values, its in zip(logits, self.own_temperature))

    def _trust_logits(self, surprise: Tensor | None, mask: Tensor | None) -> Tensor:
        if surprise is None:
            return self.trust_offset
        if mask is not None:
            # Nobody's distance: not even NaN may reach a gradient.
            surprise = surprise.masked_fill(~mask, 0.0)
        # What lies far from everything seen never gains trust by it.
        return self.trust_offset - self.surprise_weight.clamp_min(0) * surprise

    def fit(
        self,
        logits: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Tensor,
        *,
        surprise: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        clean: Tensor | None = None,
        temperature: Tensor | None = None,
        prior_scale: float = 1.0,
        fit_gating: bool = True,
        tolerance: float | None = None,
        max_iterations: int = 100,
    ) -> float:
        """Calibrate on held-out samples.

        First each modality's temperature, on the clean samples that have it. Then trust, surprise
        weights and scale by MAP: the NLL of the fused logits plus a Gaussian prior around a trust
        of 0.98 for everybody.

        Args:
            logits: M of [N, K], from samples that training has not seen, and corrupted or masked
                copies of them.
            targets: [N] int64.
            surprise, mask: as in :meth:`forward`.
            sample_weight: [N], how many samples each row counts for in the second step, beside the
                one that the prior counts for; 1 by default.
            clean: [N] bool, which rows are no corrupted copies; all by default.
            temperature: [M], T_m to keep instead of fitting it.
            prior_scale: standard deviation of the prior in units of each parameter's own width
                (``WIDTHS``): small values stay close to its mean.
            fit_gating: False fits the temperatures and the scale only, and trusts wholly.
            tolerance: what guarding against corruption may cost on the clean rows: this share of
                their NLL plus a sixth of it in nats. The weight of the corrupted rows is lowered
                (to 0.3, 0.1 or 0 of itself) until it costs no more. None leaves the weights.

        Returns the final NLL in nats. Deterministic: float64, L-BFGS. Raises ValueError, and
        nothing changes, if the fit is not finite or there are no values to fit to (the meta
        device).
        """
        device = self.log_temperature.device
        logits = as_sequence(logits, self.modalities, "logits")
        self._check_values(logits)
        logits = [values.detach().double().to(device) for values in logits]
        targets = targets.to(device)
        surprise = None if surprise is None else surprise.detach().double().to(device)
        mask = None if mask is None else mask.to(device)
        weight = torch.ones(len(targets)) if sample_weight is None else sample_weight
        weight = weight.double().to(device)
        clean = torch.ones_like(targets, dtype=torch.bool) if clean is None else clean.to(device)
        if temperature is None:
            temperature = own_temperatures(logits, targets, mask, clean)
        several = len(self.modalities) > 1
        kinds = () if not several else tuple(WIDTHS) if fit_gating else ("log_scale",)

        def fitted(hedge: float) -> tuple[Gate, Tensor]:
            """A gate fitted with so much of the corrupted rows' weight, and all rows' losses."""
            work = Gate(self.modalities, impl=self.impl).to(device).double()
            work.own_temperature.copy_(self.own_temperature)
            work.log_temperature.copy_(temperature.double().log())
            if several and fit_gating:
                work.trust_offset.fill_(OFFSET)
            parameters = {name: getattr(work, name) for name in kinds}
            start = {name: value.detach().clone() for name, value in parameters.items()}
            count = torch.where(clean, weight, hedge * weight)

            def losses() -> Tensor:
                fused = work(logits, surprise, mask).logits
                return F.cross_entropy(fused, targets, reduction="none")

            def objective() -> Tensor:
                penalty = sum(
                    ((value - start[name]) / (WIDTHS[name] * prior_scale)).square().sum()
                    for name, value in parameters.items()
                )
                return ((count * losses()).sum() + penalty / 2) / count.sum()

            if parameters:
                _minimise(objective, list(parameters.values()), max_iterations)
            with torch.no_grad():
                return work, losses()

        hedges = HEDGES
        if tolerance is None or not (several and fit_gating) or not clean.any() or clean.all():
            hedges = HEDGES[:1]
        found = [fitted(hedge) for hedge in hedges]
        cost = [float((weight * rows)[clean].sum() / weight[clean].sum()) for _, rows in found]
        least = min((its for its in cost if math.isfinite(its)), default=math.inf)
        allowed = least + (tolerance or 0.0) * (least + 1 / 6)
        # The most that is not too dear; the least clean loss always qualifies.
        good = (pair for pair, its in zip(found, cost) if its <= allowed)
        work, rows = next(good, found[0])
        final = float((weight * rows).sum() / weight.sum())
        values = [value.detach() for name, value in work.named_parameters()]
        finite = all(bool(torch.isfinite(value).all()) for value in values)
        if not finite or not math.isfinite(final):
            raise ValueError(
                "logits: the calibration did not converge to finite values; "
                "are there infinite or NaN logits among the held-out samples?"
            )
        self.load_state_dict(
            {name: value.detach().float() for name, value in work.state_dict().items()}
        )
        return final

    @torch.no_grad()
    def fit_scale(
        self,
        logits: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Tensor,
        *,
        surprise: Tensor | None = None,
        mask: Tensor | None = None,
        weight: float = 30.0,
    ) -> None:
        """Move the scale to where these clean held-out samples are calibrated; the rest stays.

        The scale that is there counts as much as ``weight`` samples with a standard deviation of 1
        in its logarithm: a validation split is often one subject. Arguments as in :meth:`fit`.
        """
        device = self.log_scale.device
        logits = as_sequence(logits, self.modalities, "logits")
        self._check_values(logits)
        logits = [values.to(device, torch.float32) for values in logits]
        surprise = None if surprise is None else surprise.to(device, torch.float32)
        fused = self(logits, surprise, None if mask is None else mask.to(device)).logits
        temperature = fit_temperature(fused.cpu(), targets.cpu(), weight=weight)
        self.log_scale.sub_(math.log(temperature))

    def _check_values(self, logits: Sequence[Tensor]) -> None:
        """InputError where gate or logits are on the meta device, which holds no values."""
        if self.log_scale.is_meta:
            raise InputError(
                "gate: is on the meta device, which holds no values; "
                'call to_empty(device="cpu") and load_state_dict, then calibrate'
            )
        if any(values.is_meta for values in logits):
            raise InputError(
                "logits: are on the meta device, which holds no values; "
                "give logits of a model on the CPU or a GPU"
            )

    @torch.no_grad()
    def reset(self) -> None:
        """Back to neutral: T = 1, r = 1, scale = 1."""
        for value in self.parameters():
            value.zero_()
        self.trust_offset.fill_(WHOLE)


def _minimise(objective, parameters: list[nn.Parameter], max_iterations: int) -> None:
    """L-BFGS from where the parameters are."""
    for value in parameters:
        value.requires_grad_(True)
        value.grad = torch.zeros_like(value)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max_iterations, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = objective()
        if not torch.isfinite(loss):
            # A trial step that went too far: NaN would send the line search farther still.
            return loss.new_tensor(1e10)
        loss.backward()
        return loss

    optimizer.step(closure)


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
