{ ... }: { imports = [ ./app_modules/shop ]; networking.domain = "[%%etcd001.ipv4%%]"; }
