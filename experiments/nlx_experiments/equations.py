# SPDX-License-Identifier: Apache-2.0
"""The papers' equations, the functions of nlx that are them, and the tests that tie the two.

command    python -m nlx_experiments.equations   writes docs/equations.md
shows      for every numbered equation: what it says, who cites it in its docstring, and the test
           that compares with it, or why there is none

Functions are found, not listed: whoever ends a docstring with the equation's number. What a paper
only defines, prints as an identity, or what nlx does not have, says so instead.
"""

import ast
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "equations.md"
PAPERS = {
    "Nested Learning": "Behrouz, Razaviyayn, Zhong and Mirrokni (2025), *Nested Learning: The "
    "Illusion of Deep Learning Architecture*, numbers of the long paper (arXiv 2512.24695)",
    "Titans": "Behrouz, Zhong and Mirrokni (2024), *Titans: Learning to Memorize at Test Time*, "
    "arXiv 2501.00663",
}
SOURCES = ("nlx", "kernels/nlx_kernels", "experiments/nlx_experiments")


class Equation(NamedTuple):
    """One or several equations that belong together."""

    numbers: str  # "83-91, 94"
    says: str
    test: str = ""  # file::function, under tests/
    instead: str = ""  # why no function is it


NESTED = (
    Equation("1, 23, 32", "gradient descent", instead="`optax.sgd`; 8 is it as a level's write"),
    Equation("2, 3", "a step, or all of them, as one minimisation",
             instead="rewritings of 1; 9 is the one for a linear layer"),
    Equation("4", "learning to learn", instead="a definition; 28 is its instance for what a level "
             "begins with"),
    Equation("5, 15, 16, 21", "linear attention, with decay or without",
             "kernels/test_linear_memory.py::"
             "test_reference_is_retnet_deltanet_and_gated_deltanet"),
    Equation("6", "an associative memory maps keys to values", "nlx/test_level.py::test_delta_net"),
    Equation("7, 22", "what training minimises", instead="definitions; 8 and 23 descend on them"),
    Equation("8, 9", "a linear layer under gradient descent stores its local error under its "
             "input",
             "nlx/test_level.py::test_a_linear_layer_under_momentum_sgd_is_a_level"),
    Equation("12, 13", "momentum stores gradients", "nlx/optim/test_gradient_memory.py::"
             "test_constant_dot_is_trace_to_the_bit"),
    Equation("14, 61", "queries, keys and values are projections of tokens",
             instead="linear maps, which every mixer of `nlx.nn` has of its own"),
    Equation("17, 18", "linear attention is a step of gradient descent for each token",
             "kernels/test_levels.py::test_linear_memory"),
    Equation("19, 20", "levels: objectives, contexts, parameters, each descending on its own",
             "nlx/test_laws.py::test_levels_obey_the_laws"),
    Equation("24, 25, 27", "direct transfer: a level's output or parameters in another's forward",
             "nlx/nn/test_mixers.py::test_hope_is_its_nest"),
    Equation("26", "linear attention as a transfer", instead="16 with the query's projection "
             "written out"),
    Equation("28", "transfer by initialisation: what a level begins with is learned outside",
             "nlx/test_nest.py::test_a_nest_three_deep_learns_through_everything_inside"),
    Equation("29", "backpropagation", instead="the chain rule, which `jax.grad` applies"),
    Equation("30, 31", "gradient descent in every layer",
             instead="8 and 9 for one layer of a network"),
    Equation("10, 11, 33, 34, 100", "heavy-ball momentum, in 10 and 11 without decay",
             "nlx/optim/test_momentum.py::test_momentum_is_optax_trace_to_the_bit"),
    Equation("35-37", "momentum under any objective", "nlx/optim/test_gradient_memory.py::"
             "test_constant_l2_is_an_average"),
    Equation("38-40", "a preconditioner is a memory of gradients",
             "nlx/optim/test_momentum.py::test_preconditioned_momentum_is_the_chain"),
    Equation("41", "the same, learned by its own gradient", instead="a form; 102 and 107 to 110 "
             "are its instances"),
    Equation("42", "Muon: momentum read out through Newton-Schulz",
             "nlx/optim/test_momentum.py::test_orthogonal_momentum_is_muons_step"),
    Equation("43, 44", "Newton-Schulz is a level that descends to orthogonal matrices",
             "kernels/test_newton_schulz.py::test_it_is_a_level_that_descends"),
    Equation("45", "tasks whose gradients are orthogonal", instead="an example of an argument "
             "about momentum, which computes nothing with it"),
    Equation("46, 47", "preconditioned momentum",
             "nlx/optim/test_momentum.py::test_preconditioned_momentum_is_the_chain"),
    Equation("48, 49", "delta momentum",
             "nlx/optim/test_momentum.py::test_delta_momentum_is_its_transcription"),
    Equation("50", "deep momentum gradient descent (DMGD)",
             "nlx/optim/test_deep_momentum.py::test_equals_the_equations"),
    Equation("51", "momentum of features of gradients",
             "nlx/optim/test_momentum.py::test_feature_momentum_is_momentum_of_features"),
    Equation("52", "momentum with a nonlinear read-out",
             "nlx/optim/test_momentum.py::test_orthogonal_momentum_is_muons_step"),
    Equation("53", "the toy that momentum without forgetting does badly on",
             "experiments/test_compare_optimizers.py::test_the_toy_is_the_equation"),
    Equation("54-57", "delta gradient descent (DGD)",
             "nlx/optim/test_dgd.py::test_is_eq_57_for_one_input_of_any_norm"),
    Equation("58", "backpropagation chooses the values that it stores", instead="an identity"),
    Equation("59, 60", "gradient descent under any objective and retention",
             instead="a form; 57 is its instance"),
    Equation("62, 63", "softmax attention is a memory without parameters",
             "nlx/nn/test_mixers.py::test_attention_is_its_level"),
    Equation("64, 65", "Hebbian and delta rules", "kernels/test_linear_memory.py::"
             "test_reference_is_retnet_deltanet_and_gated_deltanet"),
    Equation("66-68", "Oja's rule, also as a step of gradient descent, and Omega's window",
             instead="not in nlx"),
    Equation("69", "attention, then a layer that learns in context",
             instead="a mixer of `nlx.nn` followed by 15"),
    Equation("70", "a continuum memory system is a chain of blocks",
             "nlx/nn/test_mixers.py::test_cms_is_a_chain_of_residual_blocks"),
    Equation("71", "each block learns at the end of its chunks",
             "nlx/nn/test_continuum.py::test_in_context_is_the_paper_token_by_token"),
    Equation("72, 73", "nested and sequential systems: what blocks begin with",
             "nlx/nn/test_continuum.py::test_pretraining_as_a_nest_is_the_train_step_on_clocks"),
    Equation("74", "independent blocks, summed",
             "nlx/nn/test_continuum.py::test_no_level_is_skipped_in_the_forward"),
    Equation("75", "multi-scale momentum Muon (M3), with algorithm 1",
             "nlx/optim/test_m3.py::test_literal_is_algorithm_1"),
    Equation("76-82", "projections that are memories, without values of their own",
             instead="steps to 83; Titans has fixed projections, Hope self-made values"),
    Equation("83-91", "self-modifying Titans, token by token and in chunks",
             "kernels/test_self_modifying_memory.py::test_reference_is_hope_by_hand"),
    Equation("92, 93", "the same with linear memories",
             "kernels/test_linear_memory.py::test_reference_limits"),
    Equation("94-97", "Hope: self-modifying Titans, then a continuum memory system",
             "nlx/nn/test_mixers.py::test_hope_is_its_nest"),
    Equation("98, 99", "levels with a proximal step for gradient descent",
             instead="a definition; 56 is the one step of it that is taken exactly"),
    Equation("101-103, 105", "Adam is the best element-wise memory of gradients",
             "nlx/optim/test_adam_memory.py::test_adam_memory_is_the_minimiser_over_the_history"),
    Equation("104", "with another target it is momentum", instead="an identity"),
    Equation("106-111", "AdaGrad, with outer products",
             "nlx/optim/test_adam_memory.py::test_adagrad_memory_is_the_minimiser"),
    Equation("112-121", "DGD for inputs of any norm", instead="printed with the wrong signs; "
             "57 is right at any norm with the rate that `nlx.optim.dgd` takes"),
)  # fmt: skip
TITANS = (
    Equation("1, 2", "softmax attention", "nlx/nn/test_mixers.py::test_attention_is_its_equation"),
    Equation("3", "attention with a kernel, normalised", instead="not in nlx; 4 and 5 are it "
             "without kernel and normalisation"),
    Equation("4, 5", "linear attention", "kernels/test_linear_memory.py::"
             "test_reference_is_retnet_deltanet_and_gated_deltanet"),
    Equation("6, 7", "recurrent networks write and read", instead="a definition; levels write, and "
             "their memories read"),
    Equation("8-10", "momentary and past surprise",
             "kernels/test_mlp_memory.py::test_reference_is_titans_by_hand"),
    Equation("11-15", "the long-term memory, token by token",
             "nlx/nn/test_titans.py::test_mixer_is_the_paper"),
    Equation("16-18", "the same in chunks",
             "kernels/test_mlp_memory.py::test_xla_is_the_reference"),
    Equation("19", "persistent memory", "nlx/nn/test_titans.py::test_mixer_is_the_paper"),
    Equation("20", "a feed-forward layer is attention to fixed keys", instead="a view that "
             "motivates 19"),
    Equation("21-25", "memory as context (MAC)", "nlx/nn/test_titans.py::test_mac_is_its_nest"),
    Equation("26-28", "memory as gate (MAG)",
             "nlx/nn/test_titans.py::test_variants_are_the_paper"),
    Equation("29-31", "memory as layer (MAL)",
             "nlx/nn/test_titans.py::test_variants_are_the_paper"),
    Equation("32, 33", "with a linear memory; without momentum it is Gated DeltaNet",
             "kernels/test_mlp_memory.py::test_reference_is_the_delta_rule_without_layers"),
)  # fmt: skip
EQUATIONS = {"Nested Learning": NESTED, "Titans": TITANS}


def numbers(text: str) -> list[int]:
    """From "33-35, 40" to [33, 34, 35, 40]."""
    found = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [n for first, last in found for n in range(int(first), int(last or first) + 1)]


def cited(docstring: str) -> list[tuple[str, int]]:
    """The equations of PAPERS that the sources of a docstring name, as (paper, number)."""
    parts = re.findall(r"(?:Source|References):(.*?)(?:\n\s*\n|$)", docstring, re.DOTALL)
    text = re.sub(r"\([^()]*\)", "", " ".join(" ".join(parts).split()))
    found, paper = [], None
    for part in text.split(";"):
        named = [title for title in PAPERS if title in part]
        if named or not re.match(r"\s*[Ee]qs?\.", part):
            paper = named[0] if named else None
        for listed in re.findall(r"[Ee]qs?\. ?(\d[\d, -]*)", part) if paper else ():
            found += [(paper, n) for n in numbers(listed)]
    return found


def documented(root: pathlib.Path = ROOT) -> Iterator[tuple[str, str, str]]:
    """Yields (path, name, docstring) of all public functions and classes."""
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    text = ast.get_docstring(node)
                    if text and not node.name.startswith("_"):
                        yield str(path.relative_to(root)), node.name, text


def functions(root: pathlib.Path = ROOT) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """(paper, number) -> (path, name) of those that cite it."""
    found: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for path, name, text in documented(root):
        for key in dict.fromkeys(cited(text)):
            found.setdefault(key, []).append((path, name))
    return found


def page(root: pathlib.Path = ROOT) -> str:
    """The map, as Markdown."""
    where = functions(root)
    parts = [
        "# Equations",
        "Every numbered equation of the two papers; the functions whose docstrings name it and the "
        "test that compares with it, or in italics why there is none. Written by `python -m "
        "nlx_experiments.equations` from the sources: a test fails when it is not up to date.",
    ]
    for paper, title in PAPERS.items():
        parts += [f"## {paper}", title + "."]
        lines = ["| equation | says | in nlx | test |", "| --- | --- | --- | --- |"]
        for row in EQUATIONS[paper]:
            them = dict.fromkeys(f for n in numbers(row.numbers) for f in where.get((paper, n), ()))
            told = ", ".join(f"`{name}` in {path}" for path, name in them) or f"*{row.instead}*"
            test = row.test and f"tests/{row.test}".replace("::", " ")
            lines.append(f"| {row.numbers} | {row.says} | {told} | {test} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
