"""Poolings of the neighbouring literature; a shared model that uses one carries its file too."""

from .attsets_pooling import AttSetsPooling as AttSetsPooling
from .generalized_mean_pooling import GeneralizedMeanPooling as GeneralizedMeanPooling
from .hopfield_pooling import HopfieldPooling as HopfieldPooling
from .linear_pooling import LinearPooling as LinearPooling
from .ponet_pooling import PoNetPooling as PoNetPooling
from .pyramid_pooling import PyramidPooling as PyramidPooling
