"""Small mixtures of experts, one for each kind of router."""
from lm.models import layers, moe

ROWS, TIME, WIDTH, HIDDEN, EXPERTS = 4, 6, 8, 12, 8

KINDS = {
    'mixtral': moe.Experts(moe.SoftmaxRouter(2), EXPERTS, HIDDEN),
    'qwen2': moe.Experts(moe.SoftmaxRouter(4, renormalize=False), EXPERTS, HIDDEN, shared=layers.FeedForward(16),
                         shared_gate=True),
    'gpt_oss': moe.Experts(moe.SoftmaxRouter(3, bias=True), EXPERTS, HIDDEN, moe.ClampedGated(2., 1.5), bias=True),
    'deepseek': moe.Experts(moe.SigmoidGroupRouter(3, 4, 2, 2.5), EXPERTS, HIDDEN, shared=layers.FeedForward(16)),
    'llama4': moe.Experts(moe.SigmoidRouter(1), EXPERTS, HIDDEN, weight_inputs=True, shared=layers.FeedForward(16)),
}
