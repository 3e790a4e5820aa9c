"""Fine-tune the shipped weights to another real set: scikit-learn's handwritten digits.

pip install scikit-learn && python examples/fine_tune_digits.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import convmixer

EPOCHS, BATCH, RATE = 3, 64, 3e-3

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # (N, 1, 8, 8), from 0 to 1
images = (F.interpolate(images, size=(16, 16), mode="bilinear") - 0.5) / 0.25
labels = torch.tensor(digits.target)
train, test = train_test_split(torch.arange(len(labels)), test_size=0.25, random_state=0)

# One input channel: the stem is adapted. Ten classes are as many as CIFAR-10 has, so the new head is asked for.
model = convmixer.create_model("convmixer_256_8", pretrained=True, in_chans=1)
model.reset_classifier(10)
device = next(model.parameters()).device
images, labels = images.to(device), labels.to(device)
steps = EPOCHS * (len(train) // BATCH)
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=steps)

for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for index in train[torch.randperm(len(train))].split(BATCH):
        if len(index) == BATCH:
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
    model.eval()
    with torch.inference_mode():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"epoch {epoch + 1}: loss {total / (len(train) // BATCH):.3f}, test accuracy {100 * accuracy:.1f} %")
