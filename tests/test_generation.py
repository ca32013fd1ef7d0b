"""Generation does not depend on how the caller left the model."""

from safelocus.model.generation import generate
from tiny_targets import PROMPTS, dense, moe


def test_a_model_left_in_training_mode_answers_as_it_is_used():
    target = dense()
    expected = generate(target, PROMPTS, max_new_tokens=8)
    target.model.train()
    target.model.activation_checkpointing_enable()  # as trainers do; it switches the cache off
    assert generate(target, PROMPTS, max_new_tokens=8) == expected
    assert target.model.training


def test_a_mixture_whose_routers_logits_a_trainer_puts_out_answers_too():
    target = moe()
    expected = generate(target, PROMPTS, max_new_tokens=8)
    target.model.config.output_router_logits = True
    assert generate(target, PROMPTS, max_new_tokens=8) == expected
    assert target.model.config.output_router_logits
