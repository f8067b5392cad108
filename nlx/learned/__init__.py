# SPDX-License-Identifier: Apache-2.0
"""Learning to optimise: rules with parameters of their own, and a level above whole runs."""

from nlx.learned import tasks as tasks
from nlx.learned.controls import HypergradientState as HypergradientState
from nlx.learned.controls import adam_rule as adam_rule
from nlx.learned.controls import dmgd_rule as dmgd_rule
from nlx.learned.controls import hypergradient_rule as hypergradient_rule
from nlx.learned.controls import momentum_rule as momentum_rule
from nlx.learned.estimators import Estimator as Estimator
from nlx.learned.estimators import Run as Run
from nlx.learned.estimators import backpropagation as backpropagation
from nlx.learned.estimators import es as es
from nlx.learned.estimators import pes as pes
from nlx.learned.lstm import LSTMState as LSTMState
from nlx.learned.lstm import log_and_sign as log_and_sign
from nlx.learned.lstm import lstm_rule as lstm_rule
from nlx.learned.mlp import MLPState as MLPState
from nlx.learned.mlp import mlp_rule as mlp_rule
from nlx.learned.rule import Rule as Rule
from nlx.learned.rule import Theta as Theta
from nlx.learned.rule import as_transformation as as_transformation
from nlx.learned.runs import Trained as Trained
from nlx.learned.runs import Unrolled as Unrolled
from nlx.learned.runs import start as start
from nlx.learned.runs import train as train
from nlx.learned.runs import unrolled as unrolled
from nlx.learned.training import MetaState as MetaState
from nlx.learned.training import meta_level as meta_level
from nlx.learned.training import meta_start as meta_start
from nlx.learned.training import meta_step as meta_step
from nlx.learned.training import meta_train as meta_train
