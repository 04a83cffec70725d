# The public names: what `iibalance` gives, and what type checkers and editors see. The package
# reads this file and imports each name when it is first used (lazy_loader).

from .budgets import Budgets as Budgets
from .budgets import budgets_from_logits as budgets_from_logits
from .comparison.protocol import compare as compare
from .config import BudgetConfig as BudgetConfig
from .config import CalibrationConfig as CalibrationConfig
from .config import CompareConfig as CompareConfig
from .config import CompareData as CompareData
from .config import DataConfig as DataConfig
from .config import ModelConfig as ModelConfig
from .config import ObjectiveConfig as ObjectiveConfig
from .config import RunConfig as RunConfig
from .config import TrainingConfig as TrainingConfig
from .config_files import load_config as load_config
from .data.dataset import Batch as Batch
from .data.dataset import MultimodalData as MultimodalData
from .data.layouts import infer_layout as infer_layout
from .data.load import load_data as load_data
from .data.samples import Samples as Samples
from .errors import InputError as InputError
from .estimator import IIBalanceClassifier as IIBalanceClassifier
from .methods.base import Method as Method
from .methods.registry import METHODS as METHODS
from .methods.registry import make_method as make_method
from .methods.registry import tuned as tuned
from .nn.encoders import build_encoder as build_encoder
from .nn.gate import Gate as Gate
from .nn.head import HeadOutput as HeadOutput
from .nn.head import IIBalanceHead as IIBalanceHead
from .nn.loss import IIBalanceLoss as IIBalanceLoss
from .nn.loss import LossOutput as LossOutput
from .nn.model import MultimodalClassifier as MultimodalClassifier
from .nn.model import Prediction as Prediction
from .nn.prototypes import PrototypeBank as PrototypeBank
from .training.budget_stage import estimate_budgets as estimate_budgets
from .training.run import TrainResult as TrainResult
from .training.run import train as train
from .training.saving import load as load

__version__: str
