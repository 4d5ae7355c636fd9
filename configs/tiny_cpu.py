from igrpo_jax.config import default


def get_config():
    c = default()
    c.steps = 120
    c.prompts_per_step = 16
    c.model.dtype = "float32"
    c.data.instruction = ""
    c.refine.instruction = "{draft}"
    c.refine.max_draft_length = 28
    c.data.arithmetic.min_terms = 2
    c.data.arithmetic.max_terms = 4
    c.data.arithmetic.max_total = 20
    c.model.builtin.intermediate_size = 512
    c.data.max_prompt_length = 64
    c.warm_start.steps = 500
    c.warm_start.error_rate = 0.2
    c.rollout.temperature = 1.0
    c.rollout.max_completion_length = 32
    c.learner.remat = "none"
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_ratio = 0.05
    c.evaluation.every = 20
    c.evaluation.benchmarks = ("arithmetic",)
    c.evaluation.temperature = 1.0
    c.evaluation.top_p = 1.0
    c.evaluation.samples = 2
    return c
