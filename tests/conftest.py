"""How Hypothesis searches: the same examples in every run, so that no run fails by chance, and no judgement of speed.

Other examples: ``pytest --hypothesis-profile random``.
"""

from hypothesis import HealthCheck, settings

settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("random"), derandomize=True, database=None)
settings.load_profile("same")
