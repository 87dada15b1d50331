"""Which units are kept: their probabilities, how masks are drawn and how they learn. Maths on CPU tensors."""

from offload_trainer.structure.estimators import disarm as disarm
from offload_trainer.structure.estimators import rloo as rloo
from offload_trainer.structure.estimators import vr_pge as vr_pge
from offload_trainer.structure.projection import project as project
from offload_trainer.structure.samplers import bernoulli as bernoulli
from offload_trainer.structure.samplers import fixed as fixed
from offload_trainer.structure.schedules import Schedule as Schedule
from offload_trainer.structure.schedules import constant as constant
from offload_trainer.structure.schedules import cubic as cubic
from offload_trainer.structure.starts import polarised as polarised
from offload_trainer.structure.structure import Structure as Structure
