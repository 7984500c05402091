"""What is observed in a model and its gradients. Torch only: nothing here knows Ray, MLflow or a study."""
