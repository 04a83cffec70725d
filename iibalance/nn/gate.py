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

# Standard deviations of the MAP prior around the neutral gate.
WIDTHS = {
    "uncertainty_weight": 3.0,
    "surprise_weight": 1.0,
    "prior_strength": 0.5,
    "log_scale": 0.3,
}


class Gate(nn.Module):
    """Sample-wise fusion of the modalities' logits by budget, uncertainty and surprise.

    With t_m = l_m / T_m, T_m the temperature that calibrates modality m's own prediction, and
    s_m = eta log pi_m - kappa_m u_m - xi_m d_m, the weights w are the softmax of s over the
    available modalities. The fused logits are f = gamma sum_m w_m t_m with
    gamma = scale / sum_m w_m^2: the scale times the effective number of modalities behind the
    weights (Kish).

    With uniform weights that is the number available, and f the sum of their calibrated logits.
    Where a single modality is left or trusted it is 1, and f that modality's own prediction.

    Every piece starts neutral (T = 1, kappa = xi = eta = 0, scale = 1) and stays so until
    :meth:`fit`.

    Args:
        modalities: their names, in the order of the logits.
        impl: ``iib_kernels`` implementation, ``"auto"``, ``"triton"`` or ``"reference"``.

    Source: arXiv 2603.17347 (uncertainty-gated Bayesian fusion); the equations are this project's
    own formulation.

    >>> gate = Gate(["audio", "visual"])
    >>> audio, visual = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> gate([audio, visual]).logits  # neutral: the sum
    tensor([[2., 1.]])
    >>> gate([audio, visual], mask=torch.tensor([[True, False]])).logits  # audio alone: audio
    tensor([[2., 0.]])
    """

    def __init__(self, modalities: Sequence[str], *, impl: str = "auto"):
        super().__init__()
        self.modalities, self.impl = check_names(modalities), impl
        count = len(self.modalities)
        self.log_temperature = _frozen(torch.zeros(count))
        self.uncertainty_weight = _frozen(torch.zeros(count))  # kappa
        self.surprise_weight = _frozen(torch.zeros(count))  # xi
        self.prior_strength = _frozen(torch.zeros(()))  # eta
        self.log_scale = _frozen(torch.zeros(()))  # log(gamma / effective number of modalities)
        self.register_buffer("own_temperature", torch.ones(count))

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
        """Fuse the modalities' logits.

        Args:
            logits: M of [B, K].
            log_prior: log pi, [M].
            surprise: [B, M] >= 0, of :meth:`~iibalance.nn.prototypes.PrototypeBank.surprise`.
            mask: [B, M] bool, True = present.

        Returns ``FusionOutput(logits [B, K], weights [B, M], uncertainty [B, M])``. Raises
        ValueError for a row with no modality present.
        """
        logits = as_sequence(logits, self.modalities, "logits")
        strength = self.prior_strength.clamp_min(0)
        fused = iib_kernels.gated_fusion(
            logits,
            None if log_prior is None else strength * log_prior,
            gate_logits=self._gate_logits(surprise, mask),
            temperature=self.temperature,
            uncertainty_weight=self.uncertainty_weight,
            mask=mask,
            impl=self.impl,
        )
        # From 1 to the number of modalities available.
        effective = 1 / fused.weights.square().sum(-1, keepdim=True)
        gamma = (self.log_scale.exp() * effective).to(fused.logits.dtype)
        return fused._replace(logits=fused.logits * gamma)

    def own(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each modality's logits (M of [B, K]) calibrated as its own prediction."""
        return tuple(values / its for values, its in zip(logits, self.own_temperature))

    def _gate_logits(self, surprise: Tensor | None, mask: Tensor | None) -> Tensor | None:
        if surprise is None:
            return None
        if mask is not None:
            # Nobody's distance: not even NaN may reach a gradient.
            surprise = surprise.masked_fill(~mask, 0.0)
        # What lies far from everything seen never gains weight by it.
        return -self.surprise_weight.clamp_min(0) * surprise

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

        First each modality's temperature, on the clean samples that have it. Then scale, prior
        strength, uncertainty and surprise weights by MAP: the NLL of the fused logits plus a
        Gaussian prior around the neutral values.

        Args:
            logits: M of [N, K], from samples that training has not seen, and corrupted or masked
                copies of them.
            targets: [N] int64.
            log_prior, surprise, mask: as in :meth:`forward`.
            sample_weight: [N], how many samples each row counts for in the second step, beside the
                one that the prior counts for; 1 by default.
            clean: [N] bool, which rows are no corrupted copies; all by default.
            temperature: [M], T_m to keep instead of fitting it.
            prior_scale: standard deviation of the prior in units of each parameter's own width
                (``WIDTHS``): small values stay close to neutral.
            fit_gating: False fits the temperatures and gamma only.
            prior_strength: a value of eta to keep, instead of fitting it.

        Returns the final NLL in nats. Deterministic: float64, L-BFGS from the neutral values.
        Raises ValueError, and nothing changes, if the fit is not finite or there are no values to
        fit to (the meta device).
        """
        device = self.log_temperature.device
        logits = as_sequence(logits, self.modalities, "logits")
        self._check_values(logits)
        logits = [values.detach().double().to(device) for values in logits]
        targets = targets.to(device)
        surprise, log_prior = (_double(value, device) for value in (surprise, log_prior))
        mask = None if mask is None else mask.to(device)
        weight = torch.ones(len(targets)) if sample_weight is None else sample_weight
        weight = weight.double().to(device)
        if clean is None:
            clean = torch.ones_like(targets, dtype=torch.bool)
        if temperature is None:
            temperature = own_temperatures(logits, targets, mask, clean.to(device))

        work = Gate(self.modalities, impl=self.impl).to(device).double()
        work.own_temperature.copy_(self.own_temperature)
        work.log_temperature.copy_(temperature.double().log())
        kinds = () if len(self.modalities) == 1 else tuple(WIDTHS) if fit_gating else ("log_scale",)
        if prior_strength is not None:
            work.prior_strength.fill_(prior_strength)
            kinds = tuple(kind for kind in kinds if kind != "prior_strength")
        parameters = {name: getattr(work, name) for name in kinds}
        neutral = {name: value.detach().clone() for name, value in parameters.items()}

        def nll() -> Tensor:
            fused = work(logits, log_prior, surprise, mask).logits
            losses = F.cross_entropy(fused, targets, reduction="none")
            return (weight * losses).sum() / weight.sum()

        def objective() -> Tensor:
            penalty = sum(
                ((value - neutral[name]) / (WIDTHS[name] * prior_scale)).square().sum()
                for name, value in parameters.items()
            )
            return nll() + penalty / (2 * weight.sum())

        if parameters:
            _minimise(objective, list(parameters.values()), max_iterations)
        with torch.no_grad():
            final = float(nll())
        sums = torch.stack([value.detach().abs().sum() for value in work.parameters()])
        if not torch.isfinite(sums).all() or not math.isfinite(final):
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
        log_prior: Tensor | None = None,
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
        surprise, log_prior = (
            None if value is None else value.to(device, torch.float32)
            for value in (surprise, log_prior)
        )
        fused = self(logits, log_prior, surprise, None if mask is None else mask.to(device)).logits
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
        """Back to neutral: T = 1, kappa = xi = eta = 0, gamma = the number of modalities."""
        for value in self.parameters():
            value.zero_()


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


def _double(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.detach().double().to(device)


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
