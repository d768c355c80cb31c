"""From a trained model to images: guidance, seeded noise, blocks of samples."""
