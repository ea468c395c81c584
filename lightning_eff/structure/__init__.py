"""A model's repeated blocks, their matrices and parts, found by shape; and what a backward pass costs."""

from lightning_eff.structure.blocks import Block, Matrix, find_blocks
from lightning_eff.structure.flops import backward_flops
from lightning_eff.structure.matrices import coverage, describe_selection, select_matrices
from lightning_eff.structure.parts import BlockParts, find_block_parts
from lightning_eff.structure.tree import clean_named_modules, clean_named_parameters

__all__ = [
    "Block",
    "BlockParts",
    "Matrix",
    "backward_flops",
    "clean_named_modules",
    "clean_named_parameters",
    "coverage",
    "describe_selection",
    "find_block_parts",
    "find_blocks",
    "select_matrices",
]
