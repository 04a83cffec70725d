"""A control for the heads of iibalance: the same encoders trained alone with the settings that iibalance was tuned to, so that the trainings differ in the method only."""

from iibalance.methods.late import Unimodal


class Alone(Unimodal):
    """The encoders trained alone, not tuned by themselves but with iibalance's learning rate and weight decay."""

    name = "alone_as_iibalance"
    tuned_as = "iibalance"
