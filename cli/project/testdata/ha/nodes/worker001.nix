{ ... }: {
  # not yet: [%%secrets/old-token%%]
  infrastructure.shop = {
    bindToIp = "[%%localhost.overlayIp%%]"; # of [%%localhost.hostname%%]
    database = "[%%service001.overlayIp%%] [%%service001.ipv4%%]";
    environmentSecrets = [ { name = "DB"; path = "[%%secrets/databases/shop.db%%]"; } ];
  };
  nix.settings.netrc-file = "/run/keys/[%%pre-build-secrets/cache-netrc%%]";
  nix.settings.trusted-public-keys = [%%nix-store.trusted-public-keys%%];
}
