mock_provider "aws" {
  source = "../mocks"
}

variables {
  name     = "test"
  ami_id   = "ami-12345678"
  key_name = "test"
  nodes = {
    broker = {
      type      = "t3.large"
      subnet_id = "subnet-1"
      zone      = "us-east-1a"
      root_gib  = 30
      disks = {
        kafka = { size_gib = 50, mount = "/var/lib/kafka", letter = "g" }
        more  = { size_gib = 8, mount = "/var/more", letter = "f" }
      }
      security_group   = "sg-1"
      instance_profile = null
    }
    worker = {
      type             = "t3.large"
      subnet_id        = "subnet-1"
      zone             = "us-east-1a"
      root_gib         = 30
      disks            = {}
      security_group   = "sg-1"
      instance_profile = "lake"
    }
  }
}

run "nodes" {
  assert {
    condition     = alltrue([for node in aws_instance.this : node.metadata_options[0].http_tokens == "required"])
    error_message = "IMDSv2 only"
  }
  assert {
    condition = alltrue(concat(
      [for disk in aws_ebs_volume.this : disk.encrypted && disk.type == "gp3"],
      [for node in aws_instance.this : node.root_block_device[0].encrypted && node.root_block_device[0].volume_type == "gp3"],
    ))
    error_message = "encrypted gp3 disks"
  }
  assert {
    condition     = { for disk, attachment in aws_volume_attachment.this : disk => attachment.device_name } == { broker-kafka = "/dev/sdg", broker-more = "/dev/sdf" }
    error_message = "each disk has the device that it says, whatever others there are"
  }
  assert {
    condition = jsonencode(output.nodes["broker"].disks) == jsonencode([
      { device = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef0", path = "/var/lib/kafka" },
      { device = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef0", path = "/var/more" },
    ])
    error_message = "disks are named by the volume's number, as udev names them"
  }
  assert {
    condition     = length(output.nodes["worker"].disks) == 0 && aws_instance.this["worker"].iam_instance_profile == "lake"
    error_message = "a node without disks, with the lake's rights"
  }
}
