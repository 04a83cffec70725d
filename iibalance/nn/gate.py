"""The gate (method page, section 4) and its calibration (section 5, stage 3): prior, uncertainty and surprise, fitted by MAP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import iib_kernels
from iibalance.errors import as_sequence, check_names
from iibalance.metrics import fit_temperature

# Standard deviations of the MAP prior around the neutral gate.
WIDTHS = {
    "log_scale": 0.3,
    "uncertainty_weight": 3.0,
    "surprise_weight": 1.0,
    "prior_strength": 0.5,
    "network": 1.5,
}


class Gate(nn.Module):
    """Sample-wise fusion of the modalities' logits by budget, uncertainty and surprise.

    With t_m = l_m / T_m, T_m the temperature that calibrates modality m's own prediction, and s_m = eta log pi_m - kappa_m u_m - xi_m d_m + g_m, weights
    w = softmax of s over the available modalities, the fused logits are f = gamma sum_m w_m t_m with gamma = scale / sum_m w_m^2: the scale times the effective number of modalities behind the weights (Kish).
    With uniform weights that is the number available, and f the sum of their calibrated logits; where a single modality is left or trusted it is 1, and f
    that modality's own prediction. (The method page has one gamma for all samples, M when neutral, which makes a prediction from one modality out of M
    M times too sharp. README, "Departures".)

    Every piece starts neutral (T = 1, kappa = xi = eta = 0, scale = 1, a network that gives 0) and stays so until :meth:`fit`.

    Args:
        modalities: their names, in the order of the logits.
        hidden: units of the optional gate network on (uncertainty, surprise, availability) of all modalities; 0 = no network, the default.
        impl: ``iib_kernels`` implementation, ``"auto"``, ``"triton"`` or ``"reference"``.

    Source: arXiv 2603.17347 (uncertainty-gated Bayesian fusion); the equations are this project's own formulation.

    >>> gate = Gate(["audio", "visual"])
    >>> audio, visual = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> gate([audio, visual]).logits  # neutral: the sum
    tensor([[2., 1.]])
    >>> gate([audio, visual], mask=torch.tensor([[True, False]])).logits  # only audio present: audio itself
    tensor([[2., 0.]])
    """

    def __init__(self, modalities: Sequence[str], *, hidden: int = 0, impl: str = "auto"):
        super().__init__()
        self.modalities, self.hidden, self.impl = check_names(modalities), hidden, impl
        count = len(self.modalities)
        self.log_temperature = _frozen(torch.zeros(count))
        self.uncertainty_weight = _frozen(torch.zeros(count))  # kappa
        self.surprise_weight = _frozen(torch.zeros(count))  # xi
        self.prior_strength = _frozen(torch.zeros(()))  # eta
        self.log_scale = _frozen(torch.zeros(()))  # log(gamma / effective number of modalities)
        self.register_buffer("own_temperature", torch.ones(count))
        self.network = None
        if hidden:
            self.network = nn.Sequential(
                nn.Linear(3 * count, hidden), nn.Tanh(), nn.Linear(hidden, count)
            ).requires_grad_(False)
            self.reset()

    @property
    def temperature(self) -> Tensor:
        """T_m, [M]."""
        return self.log_temperature.exp()

    def forward(
        self,
        logits: Mapping[str, Tensor] | Sequence[Tensor],
        log_prior: Tensor | None = None,
        surprise: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> iib_kernels.FusionOutput:
        """Fuse logits (M of [B, K]) given log pi [M], ``surprise`` [B, M] >= 0 (:meth:`PrototypeBank.surprise`) and ``mask`` [B, M] bool.

        Returns ``FusionOutput(logits [B, K], weights [B, M], uncertainty [B, M])``. Raises ValueError for a row with no modality present.
        """
        logits = as_sequence(logits, self.modalities, "logits")
        gate_logits = self._gate_logits(logits, surprise, mask)
        fused = iib_kernels.gated_fusion(
            logits,
            None if log_prior is None else self.prior_strength.clamp_min(0) * log_prior,
            gate_logits=gate_logits,
            temperature=self.temperature,
            uncertainty_weight=self.uncertainty_weight,
            mask=mask,
            impl=self.impl,
        )
        effective = 1 / fused.weights.square().sum(
            -1, keepdim=True
        )  # from 1 to the number of modalities available
        return fused._replace(
            logits=fused.logits * (self.log_scale.exp() * effective).to(fused.logits.dtype)
        )

    def own(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each modality's logits (M of [B, K]) at the temperature that calibrates its own prediction."""
        return tuple(
            values / temperature for values, temperature in zip(logits, self.own_temperature)
        )

    def _gate_logits(
        self, logits: list[Tensor], surprise: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        terms = None
        if surprise is not None:
            if mask is not None:
                surprise = surprise.masked_fill(
                    ~mask, 0.0
                )  # nobody's distance: not even NaN may reach a gradient
            terms = (
                -self.surprise_weight.clamp_min(0) * surprise
            )  # what lies far from everything seen never gains weight by it
        if self.network is not None:
            present = (
                torch.ones(len(logits[0]), len(logits), device=logits[0].device)
                if mask is None
                else mask
            )
            surprise = (
                torch.zeros_like(present, dtype=logits[0].dtype) if surprise is None else surprise
            )
            features = torch.stack(
                [_uncertainty(values / t) for values, t in zip(logits, self.temperature)], -1
            )
            features = torch.cat([features, surprise, present.to(features.dtype)], -1)
            present = present.bool().repeat(1, 3)
            learned = self.network(features.masked_fill(~present, 0.0))
            terms = learned if terms is None else terms + learned
        return terms

    def fit(
        self,
        logits: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Tensor,
        *,
        log_prior: Tensor | None = None,
        surprise: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        clean: Tensor | None = None,
        temperature: Tensor | None = None,
        prior_scale: float = 1.0,
        fit_gating: bool = True,
        prior_strength: float | None = None,
        max_iterations: int = 100,
    ) -> float:
        """Calibrate on held-out samples.

        First each modality's temperature, on the clean samples that have it; then prior strength, uncertainty and surprise weights and the network, by MAP: NLL of the
        fused logits plus a Gaussian prior around the neutral values.

        Args:
            logits: M of [N, K], from samples that training has not seen, and corrupted or masked copies of them.
            targets: [N] int64.
            log_prior, surprise, mask: as in :meth:`forward`.
            sample_weight: [N], how many samples each row counts for in the second step, beside the one that the prior counts for; 1 by default.
            clean: [N] bool, which rows are no corrupted copies; all by default.
            temperature: [M], T_m to keep instead of fitting it.
            prior_scale: standard deviation of the prior in units of each parameter's own width (``WIDTHS``): small values stay close to neutral.
            fit_gating: False fits the temperatures and gamma only.
            prior_strength: a value of eta to keep, instead of fitting it.

        Returns the final NLL in nats. Deterministic: float64, L-BFGS from the neutral values. Nothing changes if the fit is not finite (raises).
        """
        logits = [
            values.detach().double() for values in as_sequence(logits, self.modalities, "logits")
        ]
        weight = (
            torch.ones(len(targets), dtype=torch.float64)
            if sample_weight is None
            else sample_weight.double()
        )
        device = self.log_temperature.device
        surprise, log_prior = (
            None if value is None else value.detach().double().to(device)
            for value in (surprise, log_prior)
        )
        mask = None if mask is None else mask.to(device)
        logits, targets, weight = (
            [values.to(device) for values in logits],
            targets.to(device),
            weight.to(device),
        )
        clean = torch.ones_like(targets, dtype=torch.bool) if clean is None else clean.to(device)
        if temperature is None:
            temperature = own_temperatures(logits, targets, clean, mask)
        work = Gate(self.modalities, hidden=self.hidden, impl=self.impl).to(device)
        work.load_state_dict(self.state_dict())
        work.reset()
        work.double()
        work.log_temperature.copy_(temperature.double().log())
        kinds = (
            () if len(self.modalities) == 1 else ("log_scale",) if not fit_gating else tuple(WIDTHS)
        )
        if prior_strength is not None:
            work.prior_strength.fill_(prior_strength)
            kinds = tuple(kind for kind in kinds if kind != "prior_strength")
        widths = {
            name: WIDTHS[kind]
            for name, _ in work.named_parameters()
            for kind in kinds
            if name.split(".")[0] == kind
        }
        parameters = {name: value for name, value in work.named_parameters() if name in widths}
        neutral = {name: value.detach().clone() for name, value in parameters.items()}

        def nll() -> Tensor:
            fused = work(logits, log_prior, surprise, mask).logits
            return (weight * F.cross_entropy(fused, targets, reduction="none")).sum() / weight.sum()

        if parameters:
            for value in parameters.values():
                value.requires_grad_(True)
            optimizer = torch.optim.LBFGS(
                parameters.values(),
                max_iter=max_iterations,
                tolerance_grad=1e-7,
                line_search_fn="strong_wolfe",
            )

            def closure() -> Tensor:
                optimizer.zero_grad(set_to_none=False)
                penalty = sum(
                    ((value - neutral[name]) / (widths[name] * prior_scale)).square().sum()
                    for name, value in parameters.items()
                )
                loss = nll() + penalty / (2 * weight.sum())
                if not torch.isfinite(
                    loss
                ):  # a trial step that went too far: NaN would send the line search farther still
                    return loss.new_tensor(1e10)
                loss.backward()
                return loss

            for value in parameters.values():
                value.grad = torch.zeros_like(value)
            optimizer.step(closure)
        with torch.no_grad():
            final = float(nll())
        values = torch.stack([value.detach().abs().sum() for value in work.parameters()])
        if not torch.isfinite(values).all() or not math.isfinite(final):
            raise ValueError(
                "logits: the calibration did not converge to finite values; are there infinite or NaN logits among the held-out samples?"
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
        log_prior: Tensor | None = None,
        surprise: Tensor | None = None,
        mask: Tensor | None = None,
        weight: float = 30.0,
    ) -> None:
        """Move the scale towards where the fused logits of these clean held-out samples are calibrated; everything else stays. Arguments as in :meth:`fit`.

        The scale that is there counts as much as ``weight`` samples with a standard deviation of 1 in its logarithm: a validation split is often one subject.
        """
        logits = [
            values.to(self.log_scale.device, torch.float32)
            for values in as_sequence(logits, self.modalities, "logits")
        ]
        surprise, log_prior = (
            None if value is None else value.to(self.log_scale.device, torch.float32)
            for value in (surprise, log_prior)
        )
        fused = self(
            logits, log_prior, surprise, None if mask is None else mask.to(self.log_scale.device)
        ).logits
        self.log_scale.sub_(math.log(fit_temperature(fused.cpu(), targets.cpu(), weight=weight)))

    @torch.no_grad()
    def reset(self) -> None:
        """Back to neutral: T = 1, kappa = xi = eta = 0, gamma = M, a network that gives 0 (its hidden layer stays)."""
        for name, value in self.named_parameters():
            if not name.startswith("network.0"):
                value.zero_()


def own_temperatures(
    logits: Sequence[Tensor], targets: Tensor, clean: Tensor, mask: Tensor | None
) -> Tensor:
    """[M] float64: the temperature that calibrates each modality's own prediction on the clean samples that have it; 1 where none does."""
    found = []
    for index, values in enumerate(logits):
        rows = clean if mask is None else clean & mask[:, index]
        found.append(
            fit_temperature(values[rows].cpu(), targets[rows].cpu()) if rows.any() else 1.0
        )
    return torch.tensor(found, dtype=torch.float64, device=logits[0].device)


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _uncertainty(logits: Tensor) -> Tensor:
    """Normalised entropy of softmax(logits), [B], in [0, 1]."""
    if logits.shape[-1] == 1:
        return logits.new_zeros(logits.shape[:-1])
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1) / torch.log(
        torch.tensor(float(logits.shape[-1]))
    )
