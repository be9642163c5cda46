locals {
  # A machine that is made anew under an old address has a name of its own among the known ones.
  known   = "-o StrictHostKeyChecking=accept-new"
  bastion = "${local.known} -o HostKeyAlias=${module.access.bastion.instance_id} admin@${module.access.bastion_address}"
  hosts = {
    for node, settings in var.nodes : node => merge(
      {
        ansible_host            = module.nodes.nodes[node].address
        ansible_ssh_common_args = "${local.known} -o HostKeyAlias=${module.nodes.nodes[node].instance_id} -o ProxyCommand='ssh -W %h:%p ${local.bastion}'"
        # The size of a local guest, were one made of this node; every inventory says it.
        vm_cpus      = local.prices.sizes[settings.size].vcpus
        vm_memory    = local.prices.sizes[settings.size].memory_mib
        common_disks = module.nodes.nodes[node].disks
      },
      contains(settings.groups, "kafka") ? { kafka_broker_id = settings.id } : {},
      contains(settings.groups, "zookeeper") ? { zookeeper_id = settings.id } : {},
    )
  }
  hosts_file = {
    all = {
      hosts = local.hosts
      children = {
        for group in local.groups : group => {
          hosts = { for node, settings in var.nodes : node => {} if contains(settings.groups, group) }
        }
      }
    }
  }
  group_vars = merge({
    ansible_user               = "admin"
    ansible_python_interpreter = "/usr/bin/python3"
    vm_release                 = "debian13"
    lake_uri                   = module.lake.uri
    spark_event_log_dir        = module.lake.events_uri
    # The cloud's own, which every machine reaches: no way leads to Debian's.
    common_ntp_servers = ["169.254.169.123"]
    # Where the tunnel ends: Airflow sends a browser that logs in to this address.
    airflow_base_url = "http://localhost:8087"
    # Nodes, and dashboards through the tunnel.
    postgres_client_networks = [
      for address in concat([for node in module.nodes.nodes : node.address], [module.access.bastion.private_address]) : "${address}/32"
    ]
    # The ports that the table of traffic lets through.
    spark_worker_port = 7078
    kafka_topics = [{
      name               = "ecom_clickstream_raw"
      partitions         = 3
      replication_factor = coalesce(var.kafka_replication_factor, min(3, length([for node in var.nodes : 1 if contains(node.groups, "kafka")])))
      configs            = { "retention.ms" = "604800000", "message.timestamp.type" = "LogAppendTime" }
    }]
    }, var.inventory_variables, {
    spark_config = merge({
      "spark.driver.port"                   = 7100
      "spark.blockManager.port"             = 7200
      "spark.port.maxRetries"               = 31
      "spark.hadoop.fs.s3a.endpoint.region" = var.region
    }, try(var.inventory_variables.spark_config, {}))
  })

  tunnels = {
    for name, page in {
      Airflow         = { group = "airflow", port = 8087, path = "/" }
      "Spark master"  = { group = "spark_master", port = 8080, path = "/" }
      "Spark history" = { group = "spark_master", port = 18080, path = "/" }
      Metrics         = { group = "pipeline", port = 9108, path = "/metrics" }
      Marts           = { group = "postgres", port = 5432, path = "/analytics", scheme = "postgresql" }
      } : name => {
      url     = "${try(page.scheme, "http")}://localhost:${page.port}${page.path}"
      command = "ssh -N -L ${page.port}:${[for node, s in var.nodes : module.nodes.nodes[node].address if contains(s.groups, page.group)][0]}:${page.port} ${local.bastion}"
    }
  }

  disks_gib = sum(flatten([8, [for node in var.nodes : [node.root_gib, [for disk in node.disks : disk.size_gib]]]]))
  cost_lines = concat(
    [
      for size in distinct([for node in var.nodes : node.size]) : {
        what          = "${local.prices.sizes[size].type} (${size})"
        count         = length([for node in var.nodes : 1 if node.size == size])
        usd_per_month = length([for node in var.nodes : 1 if node.size == size]) * local.prices.sizes[size].usd_per_hour * local.prices.hours_per_month
      }
    ],
    [
      { what = "${local.prices.bastion.type} (bastion)", count = 1, usd_per_month = local.prices.bastion.usd_per_hour * local.prices.hours_per_month },
      { what = "NAT gateways", count = var.nat_gateways, usd_per_month = var.nat_gateways * local.prices.nat_gateway_usd_per_hour * local.prices.hours_per_month },
      { what = "public addresses", count = var.nat_gateways + 1, usd_per_month = (var.nat_gateways + 1) * local.prices.public_address_usd_per_hour * local.prices.hours_per_month },
      { what = "GiB of gp3 disks", count = local.disks_gib, usd_per_month = local.disks_gib * local.prices.disk_usd_per_gib_month },
      { what = "keys", count = 1, usd_per_month = local.prices.key_usd_per_month },
    ],
  )
}

output "inventory" {
  description = "Path below ansible/inventories/<environment> to the file's text."
  value = {
    "hosts.yml"               = "---\n# Written by make cloud-up; change the environment in terraform/ instead.\n${yamlencode(local.hosts_file)}"
    "group_vars/all/main.yml" = "---\n# Written by make cloud-up; change the environment in terraform/ instead.\n${yamlencode(local.group_vars)}"
  }
}

output "lake" {
  description = "The bucket, its region and the URI of the tables."
  value       = { bucket = module.lake.bucket, region = var.region, uri = module.lake.uri }
}

output "tunnels" {
  description = "Page to its address on this machine while the command runs."
  value       = local.tunnels
}

output "ssh_config" {
  description = "For ssh -F or ~/.ssh/config: ssh <name>-<node>."
  value = join("\n", concat(
    [
      "Host ${var.name}-bastion", "  HostName ${module.access.bastion_address}", "  User admin",
      "  HostKeyAlias ${module.access.bastion.instance_id}", "  StrictHostKeyChecking accept-new", "",
    ],
    flatten([
      for node, made in module.nodes.nodes : [
        "Host ${var.name}-${node}", "  HostName ${made.address}", "  User admin", "  ProxyJump ${var.name}-bastion",
        "  HostKeyAlias ${made.instance_id}", "  StrictHostKeyChecking accept-new", "",
      ]
    ]),
  ))
}

output "ssh_hosts" {
  description = "Names of the nodes in ssh_config."
  value       = [for node in keys(var.nodes) : "${var.name}-${node}"]
}

output "monthly_cost" {
  description = "Rough list prices, with their date."
  value = {
    as_of         = local.prices.as_of
    prices_of     = local.prices.region
    currency      = local.prices.currency
    lines         = [for line in local.cost_lines : merge(line, { usd_per_month = floor(line.usd_per_month * 100 + 0.5) / 100 })]
    usd_per_month = floor(sum([for line in local.cost_lines : line.usd_per_month]) + 0.5)
    besides       = "the lake, ${local.prices.lake_usd_per_gib_month} for a GiB and month; requests; traffic out and through NAT"
  }
}
