"""Fine-tuning with PEFT adapters and transformers.Trainer."""
