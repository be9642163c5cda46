# The cluster: three brokers, a Spark master that also has the streams' drivers, workers, and a node for PostgreSQL,
# Airflow and monitoring.

locals {
  name   = "clickstream-prod"
  region = "us-east-1"
  tags   = {}
}

module "platform" {
  source           = "../../platform"
  name             = local.name
  region           = local.region
  admin_cidrs      = var.admin_cidrs
  admin_public_key = var.admin_public_key
  ami_id           = var.ami_id

  network_cidr             = "10.30.0.0/16"
  nat_gateways             = 3
  flow_log_days            = 90
  kafka_replication_factor = 3
  lake_prefix              = "lake"
  lake_keep_versions_days  = 30

  nodes = {
    broker-a = {
      id     = 1
      groups = ["zookeeper", "kafka"]
      size   = "medium"
      zone   = "a"
      disks = {
        kafka     = { size_gib = 500, mount = "/var/lib/kafka", letter = "f" }
        zookeeper = { size_gib = 20, mount = "/var/lib/zookeeper", letter = "g" }
      }
    }
    broker-b = {
      id     = 2
      groups = ["zookeeper", "kafka"]
      size   = "medium"
      zone   = "b"
      disks = {
        kafka     = { size_gib = 500, mount = "/var/lib/kafka", letter = "f" }
        zookeeper = { size_gib = 20, mount = "/var/lib/zookeeper", letter = "g" }
      }
    }
    broker-c = {
      id     = 3
      groups = ["zookeeper", "kafka"]
      size   = "medium"
      zone   = "c"
      disks = {
        kafka     = { size_gib = 500, mount = "/var/lib/kafka", letter = "f" }
        zookeeper = { size_gib = 20, mount = "/var/lib/zookeeper", letter = "g" }
      }
    }
    master = {
      groups = ["spark_master", "pipeline"]
      size   = "medium"
      zone   = "a"
    }
    worker-a = {
      groups = ["spark_worker"]
      size   = "memory"
      zone   = "a"
      disks  = { spark = { size_gib = 200, mount = "/var/lib/spark" } }
    }
    worker-b = {
      groups = ["spark_worker"]
      size   = "memory"
      zone   = "b"
      disks  = { spark = { size_gib = 200, mount = "/var/lib/spark" } }
    }
    control = {
      groups = ["postgres", "airflow", "monitoring"]
      size   = "medium"
      zone   = "a"
      disks  = { postgres = { size_gib = 100, mount = "/var/lib/postgresql" } }
    }
  }

  inventory_variables = {
    kafka_heap              = "4g"
    kafka_memory_max        = "6G"
    spark_worker_cores      = 8
    spark_worker_memory     = "26g"
    spark_worker_memory_max = "28G"
    postgres_shared_buffers = "2GB"
    postgres_memory_max     = "6G"
  }
}
