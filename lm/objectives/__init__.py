"""What a model is asked to predict: objectives, and the losses that they are made of."""
from lm.objectives.diffusion import masked_diffusion
from lm.objectives.distillation import distil, distil_stored
from lm.objectives.losses import token_loss
from lm.objectives.objective import Objective, cross_entropy, sequence_mean, token_mean, token_objective
from lm.objectives.preference import dpo, ipo, kto, orpo, reward, robust_dpo, simpo

__all__ = ['masked_diffusion', 'distil', 'distil_stored', 'token_loss', 'Objective', 'cross_entropy', 'sequence_mean',
           'token_mean', 'token_objective', 'dpo', 'ipo', 'kto', 'orpo', 'reward', 'robust_dpo', 'simpo']
