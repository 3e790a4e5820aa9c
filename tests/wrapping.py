"""Each wrapper that people put around a model."""

import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

WRAPPERS = {
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,  # in a process group
    "AveragedModel": AveragedModel,
    "ModelEma": ModelEma,
    "ModelEmaV2": ModelEmaV2,
    "ModelEmaV3": ModelEmaV3,
    "compiled in DataParallel in an average": lambda model: AveragedModel(nn.DataParallel(torch.compile(model))),
    "DistributedDataParallel, compiled": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
}
