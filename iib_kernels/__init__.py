"""iib_kernels: the operations under IIBalance, each a function on tensors.

    prototype_distance     squared distances of embeddings to class prototypes
    alignment_loss         prototype contrast and budget-conditioned alignment of all modalities
    nearest_prototype      distance to the nearest prototype, for the gate's surprise
    trusted_fusion         product of experts that may each be wrong, and the trust in each
    gated_fusion           weights and fused logits by prior, uncertainty and gate
    fusion_cross_entropy   the same with all its cross-entropies
    multimodal_objective   all these losses as one scalar, whose gradients come with it
    update_prototypes_     moving average of all modalities' prototypes, in place;
                           update_prototypes is its pure form for one, class_sums and ema_from_sums
                           are its two halves, for training on several processes
    snapshot               a copy of prototypes for a loss in a compiled forward that moves them

Each runs as Triton kernels, on a CPU with analytic gradients, or as plain PyTorch (``impl=``).
GatedFusion, TrustedFusion, MultimodalObjective, PrototypeDistance and AlignmentLoss are the same
as modules.

What lives here, from the equations up to the functions:

    reference.py                            the equations as they stand, which everything is
                                            tested against
    ops/                                    an operation a room: Triton kernels, launchers,
                                            operators (torch.ops.iib), autograd Functions
    objective, alignment, fusion, trust,    the public functions: checks, dtypes, bounded memory;
    prototype, update                       as modules in modules.py
    cpu/                                    the operations and a whole training step for a CPU
    compat.py                               what torch.compile and torch.func ask for
    _runtime, _registration, _tuning, ...   what they share

What may come in: torch, and triton where a kernel runs (importing this package does not import it).
Nothing of the packages above.
"""

from iib_kernels.alignment import AlignmentOutput, alignment_loss
from iib_kernels.fusion import FusionLossOutput, FusionOutput, fusion_cross_entropy, gated_fusion
from iib_kernels.modules import (
    AlignmentLoss,
    GatedFusion,
    MultimodalObjective,
    PrototypeDistance,
    TrustedFusion,
)
from iib_kernels.objective import (
    ObjectiveOutput,
    ObjectiveParts,
    ObjectiveWeights,
    multimodal_objective,
)
from iib_kernels.ops.alignment.autograd import AlignmentLossFunction
from iib_kernels.ops.distance.autograd import PrototypeDistanceFunction
from iib_kernels.ops.fusion.autograd import FusionCrossEntropyFunction, GatedFusionFunction
from iib_kernels.ops.nearest.autograd import NearestPrototypeFunction
from iib_kernels.ops.objective.autograd import MultimodalObjectiveFunction
from iib_kernels.ops.trust.autograd import TrustedFusionFunction
from iib_kernels.ops.update.autograd import UpdatePrototypesFunction
from iib_kernels.prototype import NearestOutput, nearest_prototype, prototype_distance
from iib_kernels.trust import TrustOutput, trusted_fusion
from iib_kernels.update import (
    class_sums,
    ema_from_sums,
    snapshot,
    update_prototypes,
    update_prototypes_,
)

__version__ = "0.1.0"
__all__ = [
    "AlignmentLoss",
    "AlignmentLossFunction",
    "AlignmentOutput",
    "FusionCrossEntropyFunction",
    "FusionLossOutput",
    "FusionOutput",
    "GatedFusion",
    "GatedFusionFunction",
    "MultimodalObjective",
    "MultimodalObjectiveFunction",
    "NearestOutput",
    "NearestPrototypeFunction",
    "ObjectiveOutput",
    "ObjectiveParts",
    "ObjectiveWeights",
    "PrototypeDistance",
    "PrototypeDistanceFunction",
    "TrustOutput",
    "TrustedFusion",
    "TrustedFusionFunction",
    "UpdatePrototypesFunction",
    "alignment_loss",
    "class_sums",
    "ema_from_sums",
    "fusion_cross_entropy",
    "gated_fusion",
    "multimodal_objective",
    "nearest_prototype",
    "prototype_distance",
    "snapshot",
    "trusted_fusion",
    "update_prototypes",
    "update_prototypes_",
]
