"""What would a query strategy have won? Learning curves on data that has labels already."""

from sklearn.datasets import load_wine

from queryselect import Client
from queryselect.simulate import curves

features, labels = load_wine(return_X_y=True)
held_out = slice(None, None, 3)
pool = [row for row in range(len(labels)) if row % 3]

with Client("local:") as client:  # or Client("localhost:50051")
    found = curves(
        client,
        features[pool],
        labels[pool],
        test_features=features[held_out],
        test_labels=labels[held_out],
        strategies=["random", "margin", "k_center_greedy"],
        initial=3,
        budget=3,
        rounds=5,
        seeds=range(5),
    )
print(found.table())
