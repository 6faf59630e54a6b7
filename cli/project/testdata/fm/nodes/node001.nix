{ ... }: { services.nginx.virtualHosts."[%%localhost.hostname%%].example.org".listenAddresses = [ "[%%localhost.ipv4%%]" ]; }
