"""iib_kernels: the operations under IIBalance, each one function on tensors. Depends on torch (and triton, for the kernels) only.

    prototype_distance     squared distances of embeddings to class prototypes
    alignment_loss         prototype contrast and budget-conditioned alignment of all modalities
    nearest_prototype      distance to the nearest prototype, for the gate's surprise
    gated_fusion           weights and fused logits by prior, uncertainty and gate
    fusion_cross_entropy   the same with all its cross-entropies
    update_prototypes      moving average of the prototypes (class_sums and ema_from_sums are its halves;
                           snapshot keeps the old ones for a loss in the same compiled forward)

Each runs as Triton kernels or as plain PyTorch (``impl=``); the kernels' autograd Functions are exported beside it.
"""

from iib_kernels.alignment import AlignmentLossFunction, AlignmentOutput, alignment_loss
from iib_kernels.fusion import (
    FusionCrossEntropyFunction,
    FusionLossOutput,
    FusionOutput,
    GatedFusionFunction,
    fusion_cross_entropy,
    gated_fusion,
)
from iib_kernels.prototype import (
    NearestOutput,
    NearestPrototypeFunction,
    PrototypeDistanceFunction,
    nearest_prototype,
    prototype_distance,
)
from iib_kernels.update import (
    UpdatePrototypesFunction,
    class_sums,
    ema_from_sums,
    snapshot,
    update_prototypes,
)

__version__ = "0.1.0"
__all__ = [
    "AlignmentLossFunction",
    "AlignmentOutput",
    "FusionCrossEntropyFunction",
    "FusionLossOutput",
    "FusionOutput",
    "GatedFusionFunction",
    "NearestOutput",
    "NearestPrototypeFunction",
    "PrototypeDistanceFunction",
    "UpdatePrototypesFunction",
    "alignment_loss",
    "class_sums",
    "ema_from_sums",
    "fusion_cross_entropy",
    "gated_fusion",
    "nearest_prototype",
    "prototype_distance",
    "snapshot",
    "update_prototypes",
]
