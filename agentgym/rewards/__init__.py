"""Rewards: a ledger of named terms, a declaration that composes it into one number, and who brings further terms.

compose     the declaration, its value, and the exact share of every term
ops         the operations by family
views       by turn, derived terms, added terms, as a table
dual        Lagrange multipliers of a declaration
composites  composites of the literature, ready to use
judges      who reads a finished trajectory and adds terms
automata    temporal logic over finite traces as automata
machines    reward machines
monitors    automata and machines as judges, over labels of turns
"""

from agentgym.rewards.compose import Composed, Composer, check_gamma, check_reconciles, composer
from agentgym.rewards.dual import Dual, multipliers, with_multipliers
from agentgym.rewards.nodes import Declaration
from agentgym.rewards.views import (
    DERIVED,
    POTENTIAL_SUFFIXES,
    by_turn,
    carried,
    derived,
    explain,
    turn_of,
    with_terms,
)

__all__ = [
    "DERIVED",
    "POTENTIAL_SUFFIXES",
    "Composed",
    "Composer",
    "Declaration",
    "Dual",
    "by_turn",
    "carried",
    "check_gamma",
    "check_reconciles",
    "composer",
    "derived",
    "explain",
    "multipliers",
    "turn_of",
    "with_multipliers",
    "with_terms",
]
