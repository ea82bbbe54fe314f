"""GRPO with the KL term done right: five lines change against stock TRL (marked), the rest is TRL as ever.

pip install 'klkit[trl]'
python examples/07_trl.py
"""

from datasets import Dataset
from trl import GRPOConfig

import klkit.zoo.catalogue as zoo
from klkit.api.prompts import read_prompts
from klkit.integrations.trl import GRPOTrainer, KLMonitorCallback, KLTerm  # 1: not from trl

prompts = [text for text in read_prompts("klkit:reviews").contents if isinstance(text, str)]
trainer = GRPOTrainer(
    str(zoo.path("reviews")),
    lambda completions, **_: [float(c.count("good") + c.count("great")) for c in completions],
    args=GRPOConfig(
        "runs/trl",
        beta=0.05,  # 2: the stock default is 0, no KL at all
        loss_type="luspo",  # 3: sums over each response, so that the term is beta times KL(p‖q) itself
        num_generations=8,
        max_completion_length=24,
        learning_rate=3e-4,
        max_steps=20,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=Dataset.from_dict({"prompt": prompts}),
    kl=KLTerm(leave_one_out=True),  # 4: optional
)
trainer.add_callback(KLMonitorCallback(trainer, "klkit:reviews", every=10, max_tokens=24))  # 5: optional
trainer.train()
for entry in trainer.state.log_history:
    if "kl_monitor" in entry:
        print(
            f"step {entry['step']:2d}: KL {entry['kl_monitor']:.4f} ± {entry['kl_monitor/stderr']:.4f} nats a response"
        )
    elif "kl" in entry:
        print(f"step {entry['step']:2d}: reward {entry['reward']:.2f}, kl {entry['kl']:.5f} a token")
