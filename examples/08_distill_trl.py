"""On-policy distillation in TRL by adaptive KL: two lines change against stock TRL (marked).

pip install 'klkit[trl]'
python examples/08_distill_trl.py
"""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig

import klkit
import klkit.zoo.catalogue as zoo
from klkit.api.prompts import read_prompts
from klkit.integrations.trl import DistillationTrainer  # 1: not from trl
from klkit.models.hf import HuggingFaceModel

prompts = [text for text in read_prompts("klkit:reviews").contents if isinstance(text, str)]
tokenizer = AutoTokenizer.from_pretrained(zoo.path("reviews"))
teacher, student = (AutoModelForCausalLM.from_pretrained(zoo.path(n)) for n in ("reviews-positive", "reviews"))


def distance() -> str:
    """KL(teacher‖student) between the laws of whole responses to the last 16 prompts, which are not trained on."""
    p, q = (HuggingFaceModel(model, tokenizer, name=n) for model, n in ((teacher, "teacher"), (student, "student")))
    return str(klkit.estimate(p, q, prompts[-16:], samples=4, max_tokens=24, floor="none").headline)


print("before:", distance())
trainer = DistillationTrainer(
    student,
    teacher,
    args=DistillationConfig(
        "runs/distill-trl",
        per_device_train_batch_size=8,
        max_completion_length=24,
        learning_rate=1e-3,
        max_steps=12,
        logging_steps=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,  # which recomputes layers for every token that is drawn
    ),
    train_dataset=Dataset.from_dict({"prompt": prompts[:-16]}),
    processing_class=tokenizer,
    loss="adaptive_kl,mass=0.5",  # 2: any of klkit's divergences, in place of beta
)
print("optimises:", trainer.objective)
trainer.train()
for entry in trainer.state.log_history:
    if "divergence" in entry:
        print(
            f"step {entry['step']:2d}: adaptive KL {entry['divergence']:.4f}, KL(t‖s) {entry['kl']:.4f}, KL(s‖t) "
            f"{entry['reverse_kl']:.4f} nats a token, head weight {entry['head_weight']:.2f}"
        )
print("after: ", distance())
