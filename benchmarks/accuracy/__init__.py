"""The paper's tables on tasks anyone can run: a grid of trainings, its results, and the pages made of them."""
