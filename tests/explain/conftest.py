from explained import images, linear_model, resnet, vit

__all__ = ["images", "linear_model", "resnet", "vit"]  # fixtures
