# SPDX-License-Identifier: Apache-2.0
"""A chain of residual MLP blocks, its weights shared by the rows or every row's own."""

from nlx_kernels.cms_chain.api import cms_chain as cms_chain
from nlx_kernels.cms_chain.block import ChainBlock as ChainBlock
