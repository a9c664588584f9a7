"""The whole path on a real pretrained model and real data (`graftc demo`).

It uses the public interface as a user would; nothing else imports it but its command."""
