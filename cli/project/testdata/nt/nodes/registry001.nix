{ ... }: { services.harmonia.signKeyPath = "/run/keys/[%%pre-build-secrets/harmonia.key%%]"; }
