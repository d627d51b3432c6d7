"""How updates become one model: one file per algorithm, each one screen."""

from __future__ import annotations

from fedlm.algorithms.base import Algorithm
from fedlm.algorithms.bulyan import Bulyan
from fedlm.algorithms.centred_clipping import CentredClipping
from fedlm.algorithms.delayed_nesterov import DelayedNesterov
from fedlm.algorithms.diloco import DiLoCo
from fedlm.algorithms.ditto import Ditto
from fedlm.algorithms.eager_diloco import EagerDiLoCo
from fedlm.algorithms.fedadagrad import FedAdagrad
from fedlm.algorithms.fedadam import FedAdam
from fedlm.algorithms.fedasync import FedAsync
from fedlm.algorithms.fedavg import FedAvg
from fedlm.algorithms.fedavgm import FedAvgM
from fedlm.algorithms.fedbiscuit import FedBiscuit
from fedlm.algorithms.fedbpt import FedBPT
from fedlm.algorithms.fedbuff import FedBuff
from fedlm.algorithms.feddpa import FedDPA
from fedlm.algorithms.feddyn import FedDyn
from fedlm.algorithms.fedex_lora import FedExLoRA
from fedlm.algorithms.fedit import FedIT
from fedlm.algorithms.fedkseed import FedKSeed
from fedlm.algorithms.fedmezo import FedMeZO
from fedlm.algorithms.fednova import FedNova
from fedlm.algorithms.fedprox import FedProx
from fedlm.algorithms.fedrep import FedRep
from fedlm.algorithms.fedrot_lora import FedRotLoRA
from fedlm.algorithms.fedsa_lora import FedSALoRA
from fedlm.algorithms.fedsb import FedSB
from fedlm.algorithms.fedsvd import FedSVD
from fedlm.algorithms.fedyogi import FedYogi
from fedlm.algorithms.feedsign import FeedSign
from fedlm.algorithms.ferret import Ferret
from fedlm.algorithms.ffa_lora import FFALoRA
from fedlm.algorithms.flame import FLAME
from fedlm.algorithms.flexlora import FlexLoRA
from fedlm.algorithms.flora import FLoRA
from fedlm.algorithms.fltrust import FLTrust
from fedlm.algorithms.foolsgold import FoolsGold
from fedlm.algorithms.frlora import FRLoRA
from fedlm.algorithms.hetlora import HetLoRA
from fedlm.algorithms.ifca import IFCA
from fedlm.algorithms.krum import Krum
from fedlm.algorithms.lora_fair import LoRAFAIR
from fedlm.algorithms.lora_xs import LoRAXS
from fedlm.algorithms.lorm import LoRM
from fedlm.algorithms.median import Median
from fedlm.algorithms.multi_krum import MultiKrum
from fedlm.algorithms.norm_bound import NormBound
from fedlm.algorithms.partial_prefix import PartialPrefix
from fedlm.algorithms.rfa import RFA
from fedlm.algorithms.rolora import RoLoRA
from fedlm.algorithms.scaffold import Scaffold
from fedlm.algorithms.streaming_diloco import StreamingDiLoCo
from fedlm.algorithms.task_arithmetic import TaskArithmetic
from fedlm.algorithms.ties import Ties
from fedlm.algorithms.trimmed_mean import TrimmedMean
from fedlm.errors import RecipeError, nearest
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec

CLASSES: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fednova": FedNova,
    "scaffold": Scaffold,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "diloco": DiLoCo,
    "streaming-diloco": StreamingDiLoCo,
    "eager-diloco": EagerDiLoCo,
    "delayed-nesterov": DelayedNesterov,
    "fedmezo": FedMeZO,
    "fedkseed": FedKSeed,
    "feedsign": FeedSign,
    "ferret": Ferret,
    "fedbpt": FedBPT,
    "fedasync": FedAsync,
    "fedbuff": FedBuff,
    "feddyn": FedDyn,
    "ditto": Ditto,
    "feddpa": FedDPA,
    "fedrep": FedRep,
    "fedbiscuit": FedBiscuit,
    "ifca": IFCA,
    "partial-prefix": PartialPrefix,
    "lorm": LoRM,
    "frlora": FRLoRA,
    "task-arithmetic": TaskArithmetic,
    "ties": Ties,
    "krum": Krum,
    "multi-krum": MultiKrum,
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "bulyan": Bulyan,
    "rfa": RFA,
    "norm-bound": NormBound,
    "centred-clipping": CentredClipping,
    "fltrust": FLTrust,
    "foolsgold": FoolsGold,
    "flame": FLAME,
    "fedit": FedIT,
    "ffa-lora": FFALoRA,
    "rolora": RoLoRA,
    "fedsa-lora": FedSALoRA,
    "fedrot-lora": FedRotLoRA,
    "lora-fair": LoRAFAIR,
    "fedsvd": FedSVD,
    "fed-sb": FedSB,
    "lora-xs": LoRAXS,
    "fedex-lora": FedExLoRA,
    "flora": FLoRA,
    "flexlora": FlexLoRA,
    "hetlora": HetLoRA,
}


def get_algorithm(spec: AlgorithmSpec, adapter: AdapterSpec | None = None) -> Algorithm:
    """The algorithm of this name, for this adapter (by default the recipe's default one).

    Raises:
        RecipeError: there is none of this name; another one never takes its place.
    """
    if spec.name not in CLASSES:
        raise RecipeError(
            f"unknown algorithm '{spec.name}'", where="federation.algorithm.name", fix=nearest(spec.name, CLASSES)
        )
    return CLASSES[spec.name](spec, adapter or AdapterSpec())
