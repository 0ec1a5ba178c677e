"""Plans: rules from several sources, resolved against a model."""

from tp_plugin.plans import families  # noqa: F401  (registers ours)
from tp_plugin.plans.heads import Packing, register_packing
from tp_plugin.plans.plan import Placement, Plan, RegionPlan, Rule
from tp_plugin.plans.registry import register_family
from tp_plugin.plans.resolve import plan_as, plan_for

__all__ = [
    "Packing",
    "Placement",
    "Plan",
    "RegionPlan",
    "Rule",
    "plan_as",
    "plan_for",
    "register_family",
    "register_packing",
]
