"""What is sharded how: rules from several sources, resolved against a model into a Plan."""

from tp_plugin.plans import families  # noqa: F401  (registers ours)
from tp_plugin.plans.plan import Placement, Plan, RegionPlan, Rule
from tp_plugin.plans.registry import register_family
from tp_plugin.plans.resolve import plan_for

__all__ = ["Placement", "Plan", "RegionPlan", "Rule", "plan_for", "register_family"]
