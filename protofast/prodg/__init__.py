"""ProDG: prototypes of a frozen classifier without any data, with EPIC and InfoDisent beside it.

ProDG is arXiv 2605.08858, EPIC arXiv 2505.12897, InfoDisent arXiv 2409.10329.
"""

from .bank import PromptBank
from .classifiers import load_network, save_network, train_classifier
from .concepts import Concepts
from .config import PRESETS, ProDGConfig
from .epic import EPIC, EPICConfig, train_epic
from .evaluation import across_seeds, agreement, evaluate
from .explain import Explanation, explain, picture
from .generators import Generator, Prompts, TinyFlow, train_tiny_flow
from .infodisent import InfoDisent, InfoDisentConfig, train_infodisent
from .networks import SplitNetwork, compensate, efficientnet_lite0, split
from .rotation import Rotation
from .training import ProDG, train

__all__ = [
    "EPIC",
    "PRESETS",
    "Concepts",
    "EPICConfig",
    "Explanation",
    "Generator",
    "InfoDisent",
    "InfoDisentConfig",
    "ProDG",
    "ProDGConfig",
    "PromptBank",
    "Prompts",
    "Rotation",
    "SplitNetwork",
    "TinyFlow",
    "across_seeds",
    "agreement",
    "compensate",
    "efficientnet_lite0",
    "evaluate",
    "explain",
    "load_network",
    "picture",
    "save_network",
    "split",
    "train",
    "train_classifier",
    "train_epic",
    "train_infodisent",
    "train_tiny_flow",
]
