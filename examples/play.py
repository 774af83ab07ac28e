"""The model that ships with the package, to play with: samples, the way from noise, mixed classes, attention.

pip install -e '.[viz]'
python examples/play.py
"""

import torch

import dit_in_dit as dd

model = dd.load("emoji")
print(model)

pictures = model.sample(num=36, seed=0, guidance=2.0)
pictures.grid().save("emoji.png")

way = model.sample(["animal-mammal", "country-flag"], num=8, seed=1).trajectory()
frames = [step.grid(columns=4) for step in way]
frames[0].save("way.gif", save_all=True, append_images=frames[1:], duration=80, loop=0)

noisy = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
guess = model(noisy, 1.0, torch.tensor([model.classes.index("heart")]))  # the mean of the hearts
print("first guess from pure noise:", guess.shape, "mean", round(guess.mean().item(), 3))

maps = dd.attention(model, pictures[0], t=0.3)
print("entropy of outer attention by block and head, in nats:", maps.outer.entropy.mean(-1).squeeze().round(2))
