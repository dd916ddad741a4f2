"""A BitNet b1.58 language model, weights of three values and activations of 8 bits, on the bytes of a text.

Paper: Ma et al., The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024, arXiv:2402.17764, in small;
its corpora and sizes are far beyond this.
Command: bnn-jax train --config text_bitnet --workdir runs/text_bitnet
         --data.name FILE.txt takes another text.
Data: the docstrings of this package; nothing is downloaded.
Expected: a perplexity of 4.8 a byte on the last tenth of the text, 54 % of its bytes predicted (0.46 MB of docstrings;
another version has others), after five minutes on two busy CPU cores.  The packed network, of 163 kB, has the same
perplexity to the last digit; bnn-jax verify finds none of its integers and codes to differ, on the whole test text.
Sampling: bnn-jax sample runs/text_bitnet --prompt "The " --count 200
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        name="text_bitnet",
        epochs=10,
        batch_size=32,
        loss="cross_entropy",
        data=DataConfig("text", tokens=64),
        model=ModelConfig("bitnet_lm"),
        optim=OptimConfig("adam", learning_rate=3e-3, schedule="cosine", warmup_share=0.1, latent_box=None),
    )
