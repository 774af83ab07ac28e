"""The speed of models: by part, in relation to their cost, and compared with other code."""

from dit_in_dit.benchmark.timing import Times as Times
from dit_in_dit.benchmark.timing import estimate_seconds as estimate_seconds
from dit_in_dit.benchmark.timing import product_speed as product_speed
from dit_in_dit.benchmark.timing import step_seconds as step_seconds
